"""Finding configs by path and name, and putting them together from lists of bases and rows of tables."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path

import pytest

from the_mask.config import config_names, find_config, load_config, read_config


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)


def test_bases_are_merged_from_left_to_right(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="SEED: 1\nSOLVER: {MAX_ITER: 1, BASE_LR: 1.0, WARMUP_ITERS: 1}",
        b="_BASE_: a.yaml\nSOLVER: {MAX_ITER: 2}",
        c="SOLVER: {BASE_LR: 3.0}\nOUTPUT_DIR: c",
        d="_BASE_: [b.yaml, ./c.yaml]\nSOLVER: {WARMUP_ITERS: 4}",
    )
    expected = {
        "SEED": 1,
        "OUTPUT_DIR": "c",
        "SOLVER": {"MAX_ITER": 2, "BASE_LR": 3.0, "WARMUP_ITERS": 4},
    }
    assert read_config(find_config(tmp_path / "d.yaml")) == expected


def test_lists_of_bases_are_those_of_fvcore(tmp_path: Path) -> None:
    """Files read by a plain Detectron2 config give the same."""
    from detectron2.config import get_cfg

    write(tmp_path, a="SEED: 1", b="SOLVER: {MAX_ITER: 2}", c="VERSION: 2\n_BASE_: [a.yaml, b.yaml]\nSEED: 5")
    plain = get_cfg()
    plain.merge_from_file(str(tmp_path / "c.yaml"))
    ours = load_config(tmp_path / "c.yaml")
    assert (plain.SEED, plain.SOLVER.MAX_ITER) == (ours.SEED, ours.SOLVER.MAX_ITER) == (5, 2)


def test_rows_of_a_table(tmp_path: Path) -> None:
    write(
        tmp_path,
        models="""
small: {_BASE_: base.yaml, SOLVER.MAX_ITER: 3, SOLVER.BASE_LR: 0.5}
smaller:
  _BASE_: [small.yaml]
  SOLVER: {MAX_ITER: 1, AMP.ENABLED: True}
""",
        base="SEED: 7\nSOLVER.MAX_ITER: 9\nSOLVER: {WARMUP_ITERS: 2}",
        file="_BASE_: smaller.yaml",
    )
    for name in ("smaller", "file"):
        cfg = load_config(tmp_path / f"{name}.yaml")
        assert (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS) == (7, 1, 0.5, 2)
        assert cfg.SOLVER.AMP.ENABLED
    # A file wins over a row.
    write(tmp_path, small="SEED: 1")
    assert load_config(tmp_path / "smaller.yaml").SEED == 1


def test_a_row_says_where_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, models="old: {_BASE_: base.yaml, SEED: 2}", base="SEED: 1")
    with caplog.at_level("INFO"):
        load_config(tmp_path / "old.yaml")
    assert f"{tmp_path}/old.yaml is row old of {tmp_path}/models.yaml: base.yaml, SEED 2" in caplog.text


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = load_config(Path(__file__).parents[2] / "configs/debug/mask2former_debug.yaml")
    for name in ("debug/mask2former_debug", "configs/debug/mask2former_debug.yaml", "/x/configs/debug/none.yaml"):
        if "none" in name:
            with pytest.raises(FileNotFoundError):
                find_config(name)
        else:
            assert load_config(name) == expected
    with pytest.raises(
        FileNotFoundError, match=r"vspw/mask2former_r5 does not exist; did you mean vspw/mask2former_r50"
    ):
        find_config("vspw/mask2former_r5")
    # One's own file comes first.
    (tmp_path / "debug").mkdir()
    write(tmp_path / "debug", mask2former_debug="SEED: 77")
    assert load_config("debug/mask2former_debug.yaml").SEED == 77


def test_every_name_is_found() -> None:
    names = config_names()
    assert "vspw/the_mask_mit_b0_1f" in names
    assert not any(name.rpartition("/")[2].startswith("_") for name in names)
    for name in names:
        find_config(name)


def test_a_published_model_is_a_few_lines() -> None:
    """What a newcomer has to read to see what a model is: its parts, and what differs."""
    long = {}
    for name in config_names():
        found = find_config(name)
        if name.partition("/")[0] in ("vspw", "cityscapes", "ade20k", "coco_stuff164k"):
            lines = found.path.read_text(encoding="utf-8").splitlines()
            if found.row is not None:
                start = next(i for i, line in enumerate(lines) if line.startswith(f"{found.row}:"))
                ends = [i for i, line in enumerate(lines) if i > start and not line.startswith(" ")]
                lines = lines[start : min(ends, default=len(lines))]
            long[name] = sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)
    assert len(long) > 50
    assert {name: count for name, count in long.items() if count > 10} == {}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"a": "_BASE_: a.yaml"}, r"_BASE_ leads back to .*a.yaml"),
        ({"a": "_BASE_: [b.yaml]", "b": "_BASE_: a.yaml"}, r"_BASE_ leads back to .*a.yaml"),
        ({"models": "a: {_BASE_: a.yaml}"}, r"_BASE_ leads back to .*models.yaml:a"),
        ({"a": "_BASE_: 3"}, r"_BASE_ is 3; expected the path of a config, or a list of them"),
        ({"a": "_BASE_: [b.yaml, [c.yaml]]", "b": ""}, r"expected the path of a config, or a list of them"),
        ({"a": "_BASE_: b.yaml\nSOLVER: {MAX_ITER: 1}", "b": "SOLVER: 3"}, r"SOLVER is a group of keys in one place"),
        ({"a": "_BASE_: b.yaml\nSOLVER: 3", "b": "SOLVER: {MAX_ITER: 1}"}, r"SOLVER is a group of keys in one place"),
        ({"models": "a: 3"}, r"a table of configs maps names to configs"),
        ({"models": "a: {SEED: 1}\na: {SEED: 2}"}, r"models.yaml: key a is given twice, in lines 1 and 2"),
    ],
)
def test_bad_compositions(tmp_path: Path, texts: dict[str, str], message: str) -> None:
    write(tmp_path, **texts)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "a.yaml")


def test_a_chain_of_bases_may_meet(tmp_path: Path) -> None:
    write(tmp_path, a="_BASE_: [b.yaml, c.yaml]", b="_BASE_: d.yaml", c="_BASE_: d.yaml", d="SEED: 3")
    assert load_config(tmp_path / "a.yaml").SEED == 3


def test_other_machines_need_a_flag(tmp_path: Path) -> None:
    write(tmp_path, remote="_BASE_: base.yaml\nSOLVER: {MAX_ITER: 5}", base="SEED: 6")
    handler = type("Handler", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: handler(*args, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/remote.yaml"
        write(tmp_path, local=f"_BASE_: {address}")
        for config in (address, tmp_path / "local.yaml"):
            with pytest.raises(ValueError, match="is on another machine; --allow-remote-config"):
                load_config(config)
            cfg = load_config(config, allow_remote=True)
            assert (cfg.SEED, cfg.SOLVER.MAX_ITER) == (6, 5)
    finally:
        server.shutdown()
        server.server_close()
