"""int8 against a quantised convolution by hand, its report against brute force, and what goes wrong has a name."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image
from test_runtimes import run, streaming, video
from tolerances import assert_close
from torch import nn

from the_mask.export.package import write_onnx
from the_mask.export.programs import Program
from the_mask.inference.runtimes import RuntimeCache, calibration_clips, choose, prepare_stream, quantize, use_runtime
from the_mask.inference.runtimes.sessions import OnnxRuntimeSession, OpenVinoSession, missing
from the_mask.modeling.propagation.geometry import warp

pytestmark = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="no onnxruntime")
BACKENDS = [
    "onnxruntime",
    pytest.param(
        "openvino",
        marks=[
            pytest.mark.skipif(bool(missing("openvino", "int8")), reason="no openvino or nncf"),
            pytest.mark.slow,
        ],
    ),
]


def clips(segmentor, frames):
    return [[segmentor.prepare(frame) for frame in frames]]


@pytest.fixture
def int8_wins(monkeypatch):
    monkeypatch.setattr(choose, "_measure", lambda session, _: float("int8" not in session.session_name))
    real = choose._Chooser._makers

    def named(makers):
        def make(name):
            session = makers[name]()
            session.session_name = name
            return session

        return {name: (lambda name=name: make(name)) for name in makers}

    monkeypatch.setattr(choose._Chooser, "_makers", lambda self, *arguments: named(real(self, *arguments)))
    int8 = choose._Chooser._int8_makers
    monkeypatch.setattr(choose._Chooser, "_int8_makers", lambda self, *arguments: named(int8(self, *arguments)))


class OneConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x):
        return (self.conv(x),)


def test_a_convolution_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "has_int8_products", lambda: True)  # all 8 bits, whatever the processor
    torch.manual_seed(0)
    module = OneConvolution().eval()
    with torch.no_grad():  # channels of very different size, which one scale could not serve
        module.conv.weight.mul_(torch.tensor([0.01, 0.1, 1.0, 3.0, 10.0])[:, None, None, None])
    calls = [[torch.rand(1, 3, 12, 12) * 4 - 1] for _ in range(4)]
    graph = write_onnx(Program("conv", module, tuple(calls[0]), ["x"], ["y"]), tmp_path)
    quantize.write_int8(graph, calls, tmp_path / "int8.onnx", "onnxruntime")
    x = calls[0][0]
    (found,) = OnnxRuntimeSession(tmp_path / "int8.onnx")([x])

    low, high = (min(float(c[0].min()) for c in calls), max(float(c[0].max()) for c in calls))
    scale = (high - low) / 255
    zero = np.round(-low / scale)
    seen = (np.clip(np.round(x.double().numpy() / scale) + zero, 0, 255) - zero) * scale
    weight = module.conv.weight.detach().double().numpy()
    steps = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / 127
    rounded = torch.from_numpy(np.round(weight / steps) * steps)
    expected = nn.functional.conv2d(torch.from_numpy(seen), rounded, module.conv.bias.detach().double())
    outputs = torch.cat([module(c[0])[0].detach() for c in calls])
    quantum = float(outputs.max() - outputs.min()) / 255
    assert float((found.double() - expected).abs().max()) <= 1.01 * quantum
    # And it is quantised at all.
    assert float((found - module(x)[0].detach()).abs().max()) > 0


class Shift(nn.Module):
    """Reads a map a third of a cell to the right, a place that a convolution gives."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.bias.copy_(torch.tensor([1 / 3, 0.0]))

    def forward(self, x):
        return (warp(x, self.conv(x)),)


@pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("openvino", marks=BACKENDS[1].marks[:1])])
def test_positions_are_not_quantised(backend, tmp_path):
    """On a map of 600 cells, 256 steps of a coordinate would be more than two cells each."""
    x = torch.linspace(0, 4 * torch.pi, 600).sin().expand(1, 1, 4, 600).contiguous()
    module = Shift().eval()
    graph = write_onnx(Program("shift", module, (x,), ["x"], ["y"]), tmp_path)
    path = tmp_path / ("int8.onnx" if backend == "onnxruntime" else "int8.xml")
    quantize.write_int8(graph, [[x]], path, backend)
    (found,) = (OnnxRuntimeSession if backend == "onnxruntime" else OpenVinoSession)(path)([x])
    # A quantum of x, and one of the result; a cell more or less would be 0.02.
    assert float((found - module(x)[0].detach()).abs().max()) <= 2 * 2 / 255


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_in_int8(backend, tmp_path, int8_wins):
    segmentor, frames = streaming("swiftnet_debug"), video(4)
    expected = [scores.argmax(0) for scores in run(segmentor, frames)]
    report = use_runtime(segmentor.model, backend, "int8", RuntimeCache(tmp_path), clips(segmentor, frames))
    assert list(report.chosen.values()) == [f"{backend}, int8"]
    found = [scores.argmax(0) for scores in run(segmentor, frames)]
    same = np.mean([float((a == b).float().mean()) for a, b in zip(found, expected, strict=True)])
    assert same > 0.9
    assert report.accuracy.frames == 4
    assert report.accuracy.agreement == pytest.approx(same, abs=0.05)  # of cells, not of pixels
    report.classes = ["sky"]
    assert ("sky" in str(report)) == (0 in report.accuracy.iou)


@pytest.mark.slow
def test_keyframe_models_are_calibrated_on_frames_that_follow(tmp_path, int8_wins):
    segmentor, frames = streaming("gsvnet_debug", "MODEL.KEYFRAME.INTERVAL", 2), video(4)
    report = use_runtime(segmentor.model, "onnxruntime", "int8", RuntimeCache(tmp_path), clips(segmentor, frames))
    assert sorted(report.chosen.values()) == ["onnxruntime, int8"] * 2
    second = streaming("gsvnet_debug", "MODEL.KEYFRAME.INTERVAL", 2)
    again = use_runtime(second.model, "onnxruntime", "int8", RuntimeCache(tmp_path), clips(second, frames))
    assert again.accuracy == report.accuracy


def test_agreement_and_iou_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    expected = [torch.randint(0, 4, (5, 6), generator=generator) for _ in range(3)]
    found = [torch.randint(0, 5, (5, 6), generator=generator) for _ in range(3)]
    result = quantize.compare(found, expected, 5)
    pairs = [(int(a), int(b)) for x, y in zip(found, expected, strict=True) for a, b in zip(x.flatten(), y.flatten())]
    assert result.agreement == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert set(result.iou) == {b for _, b in pairs}
    for c, value in result.iou.items():
        assert value == pytest.approx(sum(a == b == c for a, b in pairs) / sum(c in pair for pair in pairs))


def test_float32_is_kept_where_int8_does_not_pay(tmp_path, monkeypatch, caplog):
    segmentor, frames = streaming("swiftnet_debug"), video(2)
    expected = run(segmentor, frames)
    seconds = iter([1.0, 2.0])  # float32 first
    monkeypatch.setattr(choose, "_measure", lambda *_: next(seconds))
    report = use_runtime(segmentor.model, "onnxruntime", "int8", RuntimeCache(tmp_path), clips(segmentor, frames))
    assert list(report.chosen.values()) == ["onnxruntime"]
    assert "as fast" in report.left_out["int8"]
    assert caplog.text.count("int8 is not faster") == 1
    for a, b in zip(run(segmentor, frames), expected, strict=True):
        assert_close(a, b, "runtime", largest=True)


@pytest.mark.slow
def test_float32_runs_where_int8_changes_too_much(tmp_path, int8_wins, monkeypatch, caplog):
    monkeypatch.setattr(choose, "LEAST_AGREEMENT", 1.1)
    segmentor, frames = streaming("swiftnet_debug"), video(2)
    expected = run(segmentor, frames)
    report = use_runtime(segmentor.model, "onnxruntime", "int8", RuntimeCache(tmp_path), clips(segmentor, frames))
    for a, b in zip(run(segmentor, frames), expected, strict=True):
        assert_close(a, b, "runtime", largest=True)
    assert list(report.chosen.values()) == ["onnxruntime"]
    assert "keep their label" in report.left_out["int8"]
    assert "float32 runs" in caplog.text


@pytest.mark.slow
def test_a_size_that_was_not_calibrated(tmp_path, int8_wins, caplog):
    segmentor = streaming("swiftnet_debug")
    other = video(2, size=(96, 64))
    expected = run(segmentor, other)
    report = use_runtime(segmentor.model, "onnxruntime", "int8", RuntimeCache(tmp_path), clips(segmentor, video(2)))
    for a, b in zip(run(segmentor, other), expected, strict=True):
        assert_close(a, b, "runtime", largest=True)
    assert sorted(report.chosen.values()) == ["onnxruntime", "onnxruntime, int8"]
    assert caplog.text.count("was not calibrated for") == 1


def test_openvino_says_what_its_int8_needs(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    without = lambda name: None if name == "nncf" else find(name)  # noqa: E731
    monkeypatch.setattr("the_mask.inference.runtimes.sessions.importlib.util.find_spec", without)
    segmentor = streaming("swiftnet_debug")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'the_mask\[int8\]' \(missing: .*nncf\)"):
        use_runtime(segmentor.model, "openvino", "int8", RuntimeCache(tmp_path), clips(segmentor, video(1)))


def test_clips_are_spread_over_a_long_source(tmp_path):
    for number in range(120):
        Image.fromarray(np.full((32, 48, 3), number, np.uint8)).save(tmp_path / f"{number:03}.png")
    found = calibration_clips(streaming("swiftnet_debug"), tmp_path)
    assert [len(clip) for clip in found] == [quantize.CLIP_FRAMES] * quantize.MOST_CLIPS
    assert [int(clip[0][0, 0, 0]) for clip in found] == list(range(0, 120, 10))
    assert [int(frame[0, 0, 0]) for frame in found[1]] == [10, 11, 12, 13]


def test_frames_are_cut_to_the_ratio_of_the_stream(tmp_path):
    segmentor = streaming("swiftnet_debug")
    across, down = np.mgrid[0:64, 0:96][::-1]
    Image.fromarray(np.stack([down, across, 0 * down], axis=-1).astype(np.uint8)).save(tmp_path / "0.png")
    (same,), (tall,) = (calibration_clips(segmentor, tmp_path, size)[0] for size in ((128, 192), (192, 64)))
    assert torch.equal(same, calibration_clips(segmentor, tmp_path)[0][0])
    # A third of 64 columns, those in the middle, and all rows.
    assert tuple(tall.shape[1:]) == segmentor.network_size(192, 64)
    assert (int(tall[1].min()), int(tall[1].max())) == (37, 57)
    assert (int(tall[0].min()), int(tall[0].max())) == (0, 63)


@pytest.mark.slow
def test_a_stream_of_another_ratio_runs_in_int8(tmp_path, int8_wins, monkeypatch, caplog):
    monkeypatch.setenv("THE_MASK_CACHE", str(tmp_path / "cache"))
    frames = tmp_path / "frames"
    frames.mkdir()
    for number, frame in enumerate(video(2)):
        Image.fromarray(frame).save(frames / f"{number}.png")
    segmentor, other = streaming("swiftnet_debug"), video(2, size=(96, 64))
    report = prepare_stream(segmentor, "onnxruntime", "int8", frames, size=(96, 64))
    run(segmentor, other)
    assert list(report.chosen.values()) == ["onnxruntime, int8"]
    assert "was not calibrated" not in caplog.text


def test_bad_input(tmp_path):
    segmentor = streaming("swiftnet_debug")
    with pytest.raises(ValueError, match="there are none: --calibrate VIDEO or FOLDER"):
        prepare_stream(segmentor, "auto", "int8")
    with pytest.raises(ValueError, match="there are none"):
        use_runtime(segmentor.model, "auto", "int8", calibration=[[]])
    with pytest.raises(ValueError, match="not backend eager, but onnxruntime"):
        use_runtime(segmentor.model, "eager", "int8", calibration=clips(segmentor, video(1)))
    with pytest.raises(ValueError, match="are for precision int8, not float32"):
        prepare_stream(segmentor, "auto", "float32", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
        prepare_stream(segmentor, "auto", "int8", tmp_path / "none.mp4")
