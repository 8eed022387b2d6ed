"""A user's own module makes its data sets known: to the loaders, to validation, to the command lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from the_mask.config import load_config
from the_mask.data import build_test_loader, get_records
from the_mask.data.plugins import import_dataset_modules
from the_mask.engine.validate import validate

REPOSITORY = Path(__file__).resolve().parents[2]
MODULE = """
from pathlib import Path
from the_mask.data import register_image_tree

folder = Path(__file__).parent
register_image_tree("NAME", folder / "pictures", folder / "masks", ["one", "two"])
"""


def test_what_runs_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "loud.py").write_text("")
    import_dataset_modules([str(tmp_path / "loud.py")])
    assert f"DATASETS.IMPORT RUNS THE CODE OF {tmp_path}/loud.py" in caplog.text
    with pytest.raises(ValueError, match="expected names of modules"):
        import_dataset_modules([3])


def write_user_data(folder: Path, name: str) -> Path:
    """Two labelled pictures and the module ``<name>.py`` that registers them as ``<name>``."""
    for kind, array in (("pictures", np.zeros((8, 8, 3))), ("masks", np.arange(64).reshape(8, 8) % 2)):
        (folder / kind).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(array.astype(np.uint8)).save(folder / kind / f"{number}.png")
    path = folder / f"{name}.py"
    path.write_text(MODULE.replace("NAME", name))
    return path


def test_a_file_registers_for_the_loader_and_validation(tmp_path: Path) -> None:
    path = write_user_data(tmp_path, "plugin_by_file")
    words = ["DATASETS.IMPORT", f"['{path}']", "DATASETS.TRAIN", "('plugin_by_file',)", "MODEL.DEVICE", "cpu"]
    cfg = load_config(None, [*words, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "2", "DATALOADER.NUM_WORKERS", "0"])
    assert sum(len(batch) for batch in build_test_loader(cfg, "plugin_by_file")) == 2
    validate(cfg)
    with pytest.raises(ValueError, match=r"unknown data set 'plugin_by_fil'.*DATASETS.IMPORT names modules"):
        get_records("plugin_by_fil")


def test_a_module_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_user_data(tmp_path, "plugin_by_name")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    import_dataset_modules(["plugin_by_name"])
    assert sys.path == before
    assert len(get_records("plugin_by_name")) == 2
    import_dataset_modules(["plugin_by_name", "json"])


def test_a_file_is_imported_once(tmp_path: Path) -> None:
    (tmp_path / "counts.py").write_text(f"open(r'{tmp_path / 'log'}', 'a').write('x')\n")
    import_dataset_modules([str(tmp_path / "counts.py")])
    import_dataset_modules([str(tmp_path / "counts.py")])
    assert (tmp_path / "log").read_text() == "x"


def test_bad_modules_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"DATASETS.IMPORT: .*absent.py does not exist \(looked for from"):
        import_dataset_modules([str(tmp_path / "absent.py")])
    with pytest.raises(ValueError, match=r"there is no module 'no_such.thing'.*no_such/thing.py"):
        import_dataset_modules(["no_such.thing"])
    with pytest.raises(ValueError, match=r"expected a list, \[\"mine.py\"\]"):
        import_dataset_modules("mine.py")
    for text, error in (("1 / 0", "ZeroDivisionError"), ("import no_such_one", "No module named 'no_such_one'")):
        (tmp_path / "broken.py").write_text(text)
        with pytest.raises(ValueError, match=rf"broken.py fails when it is imported: .*{error}"):
            import_dataset_modules([str(tmp_path / "broken.py")])


def test_check_dataset_from_the_command_line(tmp_path: Path) -> None:
    path = write_user_data(tmp_path, "plugin_by_tool")
    command = [sys.executable, "tools/check_dataset.py", "plugin_by_tool", "--import", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "plugin_by_tool" in done.stdout
