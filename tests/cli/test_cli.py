"""The command the-mask: its list, its speed, its errors, and the doors in tools/."""

import importlib
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import the_mask
from the_mask import cli
from the_mask.cli import command_names, door, load_command, main

ROOT = Path(__file__).parents[2]
DOORS = {
    "average_checkpoints": "average",
    "benchmark": "benchmark",
    "check_dataset": "check",
    "convert_checkpoint": "convert",
    "demo": "segment",
    "evaluate_keyframes": "evaluate-keyframes",
    "evaluate_predictions": "evaluate",
    "export": "export",
    "fit_temperature": "fit-temperature",
    "launch_slurm": "launch-slurm",
    "model_stats": "stats",
    "predict": "predict",
    "run_demo": "demo",
    "train_net": "train",
    "train_refiner": "train-refiner",
    "train_two_stage": "train-two-stage",
}


def test_every_command_is_listed_with_one_short_line(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name in command_names():
        line = next(line for line in printed.splitlines() if line.split()[:1] == [name])
        assert len(line) <= 100, line
        assert line.split(maxsplit=1)[1].endswith("."), line


def test_help_imports_nothing_heavy():
    """Also that of each command: whatever it needs is imported when it runs."""
    code = (
        "import sys\nfrom the_mask import cli\ncli.usage()\n"
        "for name in cli.command_names():\n"
        "    try:\n        cli.parse(cli.load_command(name), ['--help'])\n"
        "    except SystemExit:\n        pass\n"
        "heavy = {'torch', 'numpy', 'yaml', 'detectron2', 'tqdm', 'av', 'cv2', 'the_mask.config'} & set(sys.modules)\n"
        "sys.exit(f'{heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_takes_little_time():
    """Processor time, so that a busy machine does not matter; 0.04 s when it was written."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "the_mask", "--help"], cwd=ROOT, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"the_mask {the_mask.__version__}\n"


def test_no_or_unknown_command(capsys):
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out
    assert main(["segmnt"]) == 2
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert "unknown command 'trian'; did you mean train" in error


def test_user_errors_are_one_line(capsys):
    assert main(["train", "--config", "camvid/mask2former_r18_cqu"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: config file camvid/mask2former_r18_cqu does not exist; did you mean")
    assert error.count("\n") == 1


def test_a_defect_is_not_hidden(monkeypatch):
    def broken(args):
        raise KeyError("a defect")

    monkeypatch.setattr(load_command("models"), "run", broken)
    with pytest.raises(KeyError, match="a defect"):
        main(["models"])


def test_exit_code_of_a_command_is_kept(capsys):
    assert main(["check", "no_such_data_set"]) == 2
    assert "no_such_data_set" in capsys.readouterr().err


def test_configs_are_listed(capsys):
    assert main(["models", "--configs", "debug"]) == 0
    assert "debug/the_mask_debug_video" in capsys.readouterr().out.split()
    assert main(["models", "--configs", "no such part"]) == 1


def test_literal_choices_are_those_of_the_library():
    """They are written down twice, because the library's modules import torch."""
    from the_mask.export.package import EXPORT_FORMATS, KINDS
    from the_mask.inference.views import OUTPUT_STRIDES

    export, benchmark = load_command("export"), load_command("benchmark")
    assert (export.KINDS, export.FORMATS) == (KINDS, EXPORT_FORMATS)
    assert benchmark.OUTPUT_STRIDES == OUTPUT_STRIDES


@pytest.mark.parametrize("tool", DOORS)
def test_doors(tool):
    """A tool parses what its subcommand parses, under its own name."""
    done = subprocess.run(
        [sys.executable, f"tools/{tool}.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"usage: {tool}.py")
    parser_text = done.stdout.split("\n", 1)[1]
    assert load_command(DOORS[tool]).__doc__.splitlines()[0] in parser_text


def test_every_tool_has_a_command():
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert tools - set(DOORS) <= {"pack_model"}


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_options_may_follow_overrides(command):
    words = ["--model", "a", "OUTPUT_DIR", "out", "SOLVER.BASE_LR", "-1e-3", "TEST.EVAL_PERIOD", "-1", "--trust-pickle"]
    words += ["--dataset", "x", "--output", "y"] if command == "predict" else []
    args = cli.parse(load_command(command), words, None)
    assert args.trust_pickle
    assert args.opts == ["OUTPUT_DIR", "out", "SOLVER.BASE_LR", "-1e-3", "TEST.EVAL_PERIOD", "-1"]
    assert cli.parse(load_command(command), [*words, "SEED", "1", "--trust-pickle"], None).opts[-2:] == ["SEED", "1"]


def test_intermixed_overrides():
    command = load_command("benchmark")
    args = cli.parse(command, ["MODEL.DEVICE", "cpu", "--config", "debug/the_mask_debug", "TEST.STREAMING", "True"])
    assert args.opts == ["MODEL.DEVICE", "cpu", "TEST.STREAMING", "True"]
    assert args.config_file == "debug/the_mask_debug"


def test_an_unexpected_builtin_name_is_noticed():
    for name in command_names():
        for error in getattr(load_command(name), "EXPECTED", ()):
            assert issubclass(getattr(importlib.import_module("builtins"), error), Exception)


def test_door_returns_the_exit_code(capsys):
    assert door("check")(["no_such_data_set"]) == 2


def test_console_script():
    tomllib = pytest.importorskip("tomllib")
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert metadata["project"]["scripts"] == {"the-mask": "the_mask.cli:main"}
