"""The example in docs/data.md runs as it stands."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from the_mask.data.check import check_dataset

DOC = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    for split in ("train", "val"):
        for kind, array in (("origin", np.zeros((8, 8, 3), np.uint8)), ("mask", np.arange(64).reshape(8, 8) % 4)):
            folder = tmp_path / "mine" / split / "street" / kind
            folder.mkdir(parents=True)
            Image.fromarray(array.astype(np.uint8)).save(folder / "0001.png")
    monkeypatch.chdir(tmp_path)
    match = re.search(r"<!-- example -->\n```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None
    exec(compile(match[1], str(DOC), "exec"), {})
    assert capsys.readouterr().out == "1 videos\n"
    report = check_dataset("mine_val")
    assert report.ok
    assert report.class_pixels.tolist() == [16, 16, 16]
