"""The benchmark: statistics against hand-made cases, the whole on a tiny model."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from the_mask.config import load_config
from the_mask.inference import StreamingSegmentor, stage_clocks
from the_mask.inference import benchmark as bench
from the_mask.inference.demo import FrameAnnotator
from the_mask.inference.live.video_file import VideoDecoder
from the_mask.inference.rendering.video_writer import VideoWriter
from the_mask.inference.stage_clocks import STAGES
from the_mask.inference.stream import build_random
from the_mask.modeling.propagation.propagated import PropagatedSegmentor
from the_mask.modeling.segmentor import Segmentor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("benchmark_tool", ROOT / "tools" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_percentiles_are_values_that_occurred():
    found = bench.latencies([i / 1000 for i in range(100, 0, -1)])
    assert {k: round(v, 9) for k, v in found.items()} == {
        "frames": 100,
        "mean_ms": 50.5,
        "p50_ms": 50,
        "p90_ms": 90,
        "p99_ms": 99,
        "max_ms": 100,
        "frames_per_second": round(1000 / 50.5, 9),
    }
    one = bench.latencies([0.002])
    assert one["p50_ms"] == one["p99_ms"] == one["max_ms"] == 2
    assert bench.latencies([]) == {"frames": 0}


def test_keyframes_apart():
    found = bench.by_kind([0.1, 0.01, 0.03, 0.3], [True, False, False, True])
    assert (found["key"]["frames"], found["key"]["max_ms"]) == (2, 300)
    assert found["non_key"]["mean_ms"] == pytest.approx(20)
    assert list(bench.by_kind([0.1], [None])) == ["all"]


def test_whole_benchmark_of_a_propagated_model(tool, tmp_path, capsys):
    config = ROOT / "configs" / "debug" / "gsvnet_debug.yaml"
    output = tmp_path / "new" / "report.json"
    arguments = ["--config-file", str(config), "--random-weights", "--size", "48x64", "--frames", "12"]
    arguments += ["--warm-up", "3", "--streams", "2", "--output-stride", "4", "--output", str(output)]
    assert tool.main([*arguments, "MODEL.DEVICE", "cpu", "MODEL.KEYFRAME.INTERVAL", "3"]) == 0
    printed = capsys.readouterr().out
    assert "model only, non_key" in printed
    report = json.loads(output.read_text())
    model = report["model_only"]["model"]
    assert [model[kind]["frames"] for kind in ("all", "key", "non_key")] == [12, 4, 8]
    for row in (model["all"], report["end_to_end"]["interval"]["all"], report["end_to_end"]["latency"]["all"]):
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] <= row["max_ms"]
    assert report["end_to_end"]["interval"]["all"]["frames"] >= 12
    assert report["end_to_end"]["dropped"] == 0
    protocol = report["protocol"]
    assert protocol["frame_size"] == [48, 64]
    assert (protocol["policy"], protocol["interval"], protocol["weights"]) == ("interval", 3, "random")
    assert (protocol["streams"], protocol["output_stride"], protocol["warm_up_frames"]) == (2, 4, 3)
    assert report["machine"]["torch"]
    assert report["memory"]["peak_resident_mib"] > 10
    assert report["model_only"]["state_bytes"] > 1000
    stages = report["stages"]
    assert list(stages) == [*STAGES, "frame"]
    assert all(row["frames"] == 12 and row["p50_ms"] > 0 and row["processor_ms"] > 0 for row in stages.values())
    assert sum(stages[stage]["mean_ms"] for stage in STAGES) == pytest.approx(stages["frame"]["mean_ms"])
    assert "stage normalise" in printed


@pytest.mark.parametrize(
    ("owner", "name", "stage"),
    [
        (StreamingSegmentor, "prepare", "resize"),
        (Segmentor, "stack", "normalise"),
        (PropagatedSegmentor, "step", "network"),
        (StreamingSegmentor, "finish", "labels"),
        (FrameAnnotator, "draw", "overlay"),
        (VideoWriter, "write", "encode"),
        (VideoDecoder, "_image", "decode"),
    ],
)
def test_every_stage_has_its_own_clock(monkeypatch, tmp_path, owner, name, stage):
    """What is slowed down is seen in its own stage and in no other; the network's clock leaves out what it calls."""
    source = bench._moving_picture(tmp_path / "moving.mp4", (48, 64))
    cfg = load_config(ROOT / "configs" / "debug" / "gsvnet_debug.yaml", ["MODEL.DEVICE", "cpu"])
    cfg.MODEL.KEYFRAME.INTERVAL = 1
    segmentor = StreamingSegmentor(cfg, build_random(cfg))
    real, now = getattr(owner, name), [0.0]

    def slow(*args, **kwargs):
        now[0] += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, slow)
    stopped = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0] / 2)
    monkeypatch.setattr(stage_clocks, "time", stopped)
    wall, processor = stage_clocks.stage_seconds(segmentor, source, tmp_path, 2, 1)
    assert wall == {key: [float(key == stage)] * 2 for key in STAGES}
    assert processor == {key: [float(key == stage) / 2] * 2 for key in STAGES}
    assert "stack" not in vars(segmentor.model)


def test_bad_arguments(tool, tmp_path, capsys):
    arguments = ["--config-file", str(ROOT / "configs" / "debug" / "swiftnet_debug.yaml")]
    for more, message in (
        (["--random-weights", "--size", "48"], "--size 48: expected HEIGHTxWIDTH"),
        (["--random-weights", "--frames", "0"], "0 frames, 1 streams, 50 to warm up"),
        (["--random-weights", "--threads", "0"], "--threads 0: expected at least 1"),
        (["--random-weights", "--input", str(tmp_path / "none.mp4")], "none.mp4 is neither"),
        ([], "MODEL.WEIGHTS is empty"),
    ):
        assert tool.main([*arguments, *more]) == 1
        assert message in capsys.readouterr().err
