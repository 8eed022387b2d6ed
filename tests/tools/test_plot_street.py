"""benchmarks/plot_street.py puts rows where their figures say."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROWS = [
    {"model": "slow", "mIoU": 74.0, "fps": 3.0, "ours": True},
    {"model": "fast", "mIoU": 70.0, "fps": 30.0, "ours": False},
    {"model": "unmeasured", "mIoU": 71.0, "fps": None, "ours": False},
]


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("plot_street", BENCHMARKS / "plot_street.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "plot_street", module)
    spec.loader.exec_module(module)
    return module


def test_points_lie_where_their_figures_are(tool, tmp_path):
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"title": "T", "x_axis": "fps", "rows": ROWS}))
    assert tool.main(["--results", str(results), "--output", str(tmp_path / "plot.png")]) == 0
    picture = np.asarray(Image.open(tmp_path / "plot.png").convert("RGB")).astype(int)
    (slow_y, slow_x), (fast_y, fast_x) = (
        np.argwhere((picture == color).all(-1)).mean(0) for color in (tool.OURS, tool.PEER)
    )
    assert slow_x < fast_x - 300
    assert slow_y < fast_y - 100
    axes = tool.Axes.around(ROWS[:2])
    assert (slow_x, slow_y) == pytest.approx(axes.place(3.0, 74.0), abs=1)
    # Ten times the speed is the same distance everywhere.
    steps = np.diff([axes.place(speed, 70)[0] for speed in (1, 10, 100)])
    assert steps[0] == pytest.approx(steps[1])


def test_nothing_to_draw_is_said(tool, tmp_path, capsys):
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"title": "T", "x_axis": "fps", "rows": ROWS[2:]}))
    assert tool.main(["--results", str(results), "--output", str(tmp_path / "plot.png")]) == 1
    assert "no row has both" in capsys.readouterr().err
