"""Parts of models in other runtimes give what PyTorch gives, in streams, and what goes wrong has a name."""

import copy
import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from tolerances import assert_close
from torch import nn

import the_mask.modeling  # noqa: F401
from the_mask.cli import _options
from the_mask.config import load_config
from the_mask.inference import StreamingSegmentor
from the_mask.inference.runtimes import BACKENDS, PRECISIONS, RuntimeCache, choose, use_runtime
from the_mask.inference.runtimes.cache import module_digest
from the_mask.inference.runtimes.fusion import fuse_norms
from the_mask.inference.runtimes.part import Part
from the_mask.inference.stream import build_random

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "debug"
GRAPHS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(importlib.util.find_spec(name) is None), reason=f"no {name}"))
    for name in ("onnxruntime", "openvino")
]


TWO_SESSIONS = """
import gc, signal, sys
from pathlib import Path
from onnx import TensorProto, helper, save
from the_mask.inference.runtimes.sessions import OpenVinoSession
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 8, 8]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", ends[:1], ends[1:])
save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), sys.argv[1])
sessions = [OpenVinoSession(Path(sys.argv[1])) for _ in range(2)]
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
del sessions[0]
gc.collect()
sessions.clear()
gc.collect()
signal.raise_signal(signal.SIGTERM)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_signals_are_handled_after_sessions_of_openvino(tmp_path):
    """Two cores of OpenVINO that overlap leave a freed stack for signals; the next one, such as Ctrl-C, is the end."""
    pytest.importorskip("openvino")
    command = [sys.executable, "-c", TWO_SESSIONS, str(tmp_path / "graph.onnx")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), (signal.strsignal(-done.returncode), done.stderr)


def streaming(name, *options):
    torch.manual_seed(3)
    cfg = load_config(CONFIGS / f"{name}.yaml", ["MODEL.DEVICE", "cpu", *options])
    model = build_random(cfg).eval()
    # Statistics of norms that folding has to get right.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return StreamingSegmentor(cfg, model, output="scores")


def video(frames=3, size=(64, 96), seed=0):
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(frames, 3, 6, 8, generator=generator)
    return (nn.functional.interpolate(small, size=size) * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def run(segmentor, frames):
    state, results = segmentor.init_state(), []
    for frame in frames:
        scores, state = segmentor.step(frame, state)
        results.append(scores)
    return results


def assert_equal(found, expected, tolerance=1e-3):
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("backend", ["eager", *GRAPHS])
def test_streams_are_those_of_pytorch(backend, tmp_path):
    segmentor, frames = streaming("swiftnet_debug"), video(3)
    expected = run(segmentor, frames)
    report = use_runtime(segmentor.model, backend, cache=RuntimeCache(tmp_path))
    assert_equal(run(segmentor, frames), expected)
    assert list(report.chosen.values()) == [backend]


def test_another_size_is_another_session():
    segmentor = streaming("gsvnet_debug")
    videos = [video(3), video(3, size=(96, 64)), video(3)]
    expected = [run(segmentor, frames) for frames in videos]
    report = use_runtime(segmentor.model, "eager")
    for frames, scores in zip(videos, expected, strict=True):
        assert_equal(run(segmentor, frames), scores)
    assert len(report.chosen) == 4  # key segmentor and propagator, two sizes


def test_queries_of_encoder_only_models_go_through_the_runtime(tmp_path):
    segmentor, frames = streaming("videomt_debug"), video(3)
    expected = run(segmentor, frames)
    report = use_runtime(segmentor.model, "eager", cache=RuntimeCache(tmp_path))
    assert_equal(run(segmentor, frames), expected)
    assert len(report.chosen) == 1, "first and later frames share a session"


@pytest.mark.slow
@pytest.mark.parametrize("backend", [*GRAPHS, "compile"])
@pytest.mark.parametrize(
    "name", ["the_mask_debug_video", "decoderA_debug", "gsvnet_debug", "videomt_debug", "eomt_debug"]
)
def test_models_with_memory(name, backend, tmp_path):
    segmentor = streaming(name)
    frames = video(4)
    expected = run(segmentor, frames)
    use_runtime(segmentor.model, backend, cache=RuntimeCache(tmp_path))
    assert_equal(run(segmentor, frames), expected)


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="no onnxruntime")
def test_auto_measures_once_and_remembers(tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "MEASURE_SECONDS", 0.01)
    segmentor, frames = streaming("swiftnet_debug"), video(2)
    expected = run(segmentor, frames)
    report = use_runtime(segmentor.model, "auto", cache=RuntimeCache(tmp_path))
    assert_equal(run(segmentor, frames), expected)
    (label,) = report.chosen
    seconds = report.seconds[label]
    assert {"eager", "eager, channels last", "onnxruntime"} <= set(seconds)
    assert report.chosen[label] == min(seconds, key=seconds.get)
    assert report.chosen[label] in str(report)
    graphs = list((tmp_path / "runtimes").glob("*.onnx"))
    assert len(graphs) == 1
    written = graphs[0].stat().st_mtime_ns

    second = streaming("swiftnet_debug")
    monkeypatch.setattr(choose, "_measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(choose, "write_onnx", lambda *_: pytest.fail("exported again"))
    again = use_runtime(second.model, "auto", cache=RuntimeCache(tmp_path))
    assert_equal(run(second, frames), expected)
    assert again.chosen == report.chosen
    assert graphs[0].read_bytes()
    assert written <= graphs[0].stat().st_mtime_ns


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="no onnxruntime")
def test_a_damaged_graph_is_made_anew_and_other_weights_have_another_digest(tmp_path, caplog):
    segmentor, frames = streaming("swiftnet_debug"), video(1)
    expected = run(segmentor, frames)
    use_runtime(segmentor.model, "onnxruntime", cache=RuntimeCache(tmp_path))
    run(segmentor, frames)
    (graph,) = (tmp_path / "runtimes").glob("*.onnx")
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 255
    graph.write_bytes(content)
    use_runtime(segmentor.model, "onnxruntime", cache=RuntimeCache(tmp_path))
    assert_equal(run(segmentor, frames), expected)
    assert "made anew" in caplog.text

    before = module_digest(segmentor.model)
    with torch.no_grad():
        next(segmentor.model.parameters()).mul_(1.01)
    assert module_digest(segmentor.model) != before


def test_training_runs_the_original():
    segmentor = streaming("swiftnet_debug")
    use_runtime(segmentor.model, "eager")
    image = torch.rand(1, 3, 64, 64)
    assert isinstance(segmentor.model.image_logits, Part)
    assert segmentor.model.image_logits(image).requires_grad
    with torch.no_grad():
        assert not segmentor.model.image_logits(image).requires_grad


@pytest.mark.parametrize("name", ["gsvnet_debug", "the_mask_debug_video", "decoderA_debug"])
def test_weights_stay_where_they_are(name):
    segmentor = streaming(name)
    keys, modules = list(segmentor.model.state_dict()), list(segmentor.model.modules())
    for _ in range(2):  # a second call replaces the first one's parts
        use_runtime(segmentor.model, "eager")
        assert list(segmentor.model.state_dict()) == keys
        assert list(segmentor.model.modules()) == modules


def test_new_weights_end_the_sessions():
    segmentor, other, frames = streaming("gsvnet_debug"), streaming("gsvnet_debug"), video(3)
    with torch.no_grad():
        for x in other.model.parameters():
            x.add_(0.1 * torch.randn(x.shape))
    expected = run(other, frames)
    report = use_runtime(segmentor.model, "eager")
    run(segmentor, frames)
    segmentor.model.load_state_dict(other.model.state_dict())
    assert_equal(run(segmentor, frames), expected)
    assert len(report.chosen) == 2


def test_a_copied_model_has_parts_of_its_own():
    segmentor, frames = streaming("swiftnet_debug"), video(3)
    use_runtime(segmentor.model, "eager")
    expected = run(segmentor, frames)
    copied = copy.deepcopy(segmentor.model)
    with torch.no_grad():
        for x in copied.parameters():
            x.add_(0.1 * torch.randn(x.shape))
    other = streaming("swiftnet_debug")
    other.model.load_state_dict(copied.state_dict())
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = copied.image_logits(image)
        assert_equal([found], [other.model.image_logits(image)])
    copied.image_logits(image).sum().backward()
    assert any(x.grad is not None for x in copied.parameters())
    assert all(x.grad is None for x in segmentor.model.parameters())
    assert_equal(run(segmentor, frames), expected)


class Branches(nn.Module):
    """One convolution is read by its norm and by a sum; the other two by their norms alone."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.shared_bn = nn.BatchNorm2d(4)
        self.own = Conv2d(4, 4, 3, padding=1, bias=False, norm=FrozenBatchNorm2d(4))

    def forward(self, x):
        y = self.shared(x)
        return (self.own(self.shared_bn(y) + y),)


def test_norms_are_folded_only_where_nobody_else_reads():
    torch.manual_seed(0)
    module = Branches().eval()
    module.shared_bn.running_mean.normal_()
    module.own.norm.running_mean.normal_()
    x = torch.rand(1, 3, 8, 8)
    expected = module(x)[0]
    assert torch.equal(fuse_norms(module, [x])(x)[0], expected)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
        )

    def forward(self, x):
        return (self.body(x),)


def test_norms_are_folded():
    torch.manual_seed(0)
    module = Chain().eval()
    for norm in (module.body[1], module.body[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 3)
    x = torch.rand(1, 3, 8, 8)
    expected = module(x)[0]
    fused = fuse_norms(module, [x])
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    assert_close(fused(x)[0], expected, "network")


def test_bad_input(tmp_path, monkeypatch):
    model = streaming("swiftnet_debug").model
    with pytest.raises(ValueError, match="backend 'tensorrt': expected one of auto, eager"):
        use_runtime(model, "tensorrt")
    with pytest.raises(ValueError, match="precision 'int4'"):
        use_runtime(model, "eager", "int4")
    with pytest.raises(ValueError, match="no bfloat16 on the CPU"):
        use_runtime(model, "onnxruntime", "bfloat16")
    monkeypatch.setattr("the_mask.inference.runtimes.sessions.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'the_mask\[openvino\]' \(missing: onnx, onnxscript"):
        use_runtime(model, "openvino")
    segmentor = streaming("swiftnet_debug")
    report = use_runtime(segmentor.model, "auto", cache=RuntimeCache(tmp_path))
    run(segmentor, video(1))
    assert "the_mask[onnxruntime]" in report.left_out["onnxruntime"]


def test_wrong_results_are_refused(tmp_path, monkeypatch):
    segmentor = streaming("swiftnet_debug")
    monkeypatch.setattr(choose.EagerSession, "__call__", lambda self, arguments: [self.run(*arguments)[0] * 1.1])
    use_runtime(segmentor.model, "eager", cache=RuntimeCache(tmp_path))
    with pytest.raises(RuntimeError, match=r"in eager differs from PyTorch by 0\.1"):
        run(segmentor, video(1))


def test_a_model_without_parts(monkeypatch):
    segmentor, frames = streaming("swiftnet_debug"), video(1)
    monkeypatch.setattr(type(segmentor.model), "runtime_parts", lambda self: [])
    expected = run(segmentor, frames)
    with pytest.raises(ValueError, match="backend eager: ClipSegmentor does not say which of its parts"):
        use_runtime(segmentor.model, "eager")
    report = use_runtime(segmentor.model, "auto")
    assert torch.equal(run(segmentor, frames)[0], expected[0])
    assert "does not say" in str(report)


def test_the_command_line_offers_what_there_is():
    assert _options.BACKENDS == BACKENDS
    assert _options.PRECISIONS == PRECISIONS
