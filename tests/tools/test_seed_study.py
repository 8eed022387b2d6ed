"""benchmarks/seed_study.py: rows are read with errors that help, a study trains, goes on and tabulates."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        spec = importlib.util.spec_from_file_location("seed_study", ROOT / "benchmarks" / "seed_study.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "seed_study", module)
        spec.loader.exec_module(module)
        yield module


def test_rows(study, tmp_path):
    config = tmp_path / "small.yaml"
    config.touch()
    assert study.Row.parse(str(config)) == study.Row("small", config, ())
    row = study.Row.parse(f"two={config},MODEL.THE_MASK.ROUNDS=2,MODEL.WEIGHTS={{output}}/a_seed{{seed}}.pth")
    assert row.label == "two"
    assert row.overrides == ("MODEL.THE_MASK.ROUNDS", "2", "MODEL.WEIGHTS", "{output}/a_seed{seed}.pth")
    with pytest.raises(FileNotFoundError, match=r"nowhere.yaml: no such config"):
        study.Row.parse("nowhere.yaml")
    with pytest.raises(ValueError, match="'SEED' is not KEY=VALUE"):
        study.Row.parse(f"{config},SEED")


def write(folder: Path, miou: float, seconds: float) -> None:
    folder.mkdir(parents=True)
    lines = [{"iteration": 19, "time": seconds}, {"iteration": 39, "time": seconds, "sem_seg/mIoU": miou}]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "stdout.txt").write_text("iter 20 ... mem 700 MiB\niter 40 ... mem 900 MiB\n")


def test_table_of_finished_seeds(study, tmp_path, capsys):
    config = tmp_path / "a.yaml"
    config.touch()
    for seed, miou in ((1, 50.0), (2, 53.0), (3, 52.0)):
        write(tmp_path / "out" / f"a_seed{seed}", miou, seed / 10)
    write(tmp_path / "out" / "b_seed2", 40.0, 1.0)
    arguments = [str(config), f"b={config},SOLVER.MAX_ITER=3", "--output", str(tmp_path / "out"), "--table"]
    assert study.main(arguments) == 0
    assert "| a" in capsys.readouterr().out
    first, second = json.loads((tmp_path / "out" / "study.json").read_text())["rows"]
    assert first["mIoU"] == pytest.approx(mean([50, 53, 52]))
    assert first["sd mIoU"] == pytest.approx(stdev([50, 53, 52]))
    assert (first["seeds"], first["s/it"], first["MiB"]) == (3, 0.2, 900)
    assert (second["seeds"], second["mIoU"]) == (1, 40.0)
    assert study.main([str(config), str(config), "--output", str(tmp_path / "out")]) == 1


def test_trains_what_is_missing(study, tmp_path, monkeypatch, capsys):
    ran = []

    def run(command, **kwargs):
        ran.append(command)
        words = dict(zip(command[4::2], command[5::2]))
        write_into = Path(words["OUTPUT_DIR"]) / "metrics.json"
        write_into.write_text(json.dumps({"time": 1.0, "sem_seg/mIoU": 10.0, "seen": words}) + "\n")
        return type("Done", (), {"returncode": 0 if words["SEED"] == "1" else 7})

    monkeypatch.setattr(study.subprocess, "run", run)
    config = tmp_path / "a.yaml"
    config.touch()
    row = f"{config},MODEL.WEIGHTS={{output}}/first_seed{{seed}}/model_final.pth"
    arguments = [row, "--output", str(tmp_path / "out"), "--options", "SOLVER.MAX_ITER", "5"]
    assert study.main([*arguments, "--seeds", "1"]) == 0
    seen = json.loads((tmp_path / "out" / "a_seed1" / "metrics.json").read_text())["seen"]
    assert seen["MODEL.WEIGHTS"] == str(tmp_path / "out" / "first_seed1" / "model_final.pth")
    assert (seen["SOLVER.MAX_ITER"], seen["SEED"]) == ("5", "1")
    assert study.main([*arguments, "--seeds", "1"]) == 0
    assert len(ran) == 1, "a finished training is kept"
    assert study.main([*arguments, "--seeds", "2"]) == 1
    assert re.search(r"error: a, seed 2: training ended with code 7, see .*stdout.txt", capsys.readouterr().err)
