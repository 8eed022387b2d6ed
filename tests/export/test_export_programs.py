"""Exported programs give what the segmentor gives, and refuse what they cannot be."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from tolerances import assert_close
from torch import nn

import the_mask.modeling  # noqa: F401
from the_mask.config import load_config
from the_mask.data.clips import Clip
from the_mask.export import export_package, image_program, package, states, stream_programs
from the_mask.export.package import (
    OnnxSession,
    TorchSession,
    example_calls,
    moving_frame,
    to_exported,
    write_onnx,
    write_torch,
)
from the_mask.export.programs import exportable
from the_mask.modeling.segmentor import Segmentor
from the_mask.modeling.stream import NO_HINTS, Ring

ROOT = Path(__file__).resolve().parents[2]
TINY = ["MODEL.DEVICE", "cpu", "MODEL.MASK_FORMER.DEC_LAYERS", "2", "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1"]


def build(name, *options):
    torch.manual_seed(0)
    overrides = [*TINY, "MODEL.WEIGHTS", "", *options]
    return build_model(load_config(ROOT / "configs" / f"{name}.yaml", overrides)).eval()


class Averaging(Segmentor):
    """A convolution on the mean of the last three frames, with the ring of MaskClassifier as state."""

    score_stride = 2
    ring = Ring(3)

    def __init__(self):
        super().__init__(
            num_classes=4, ignore_label=255, pixel_mean=[9.0, 8, 7], pixel_std=[50.0, 60, 70], size_divisibility=4
        )
        self.conv = nn.Conv2d(3, 4, 2, stride=2)

    def losses(self, clips):
        raise NotImplementedError

    def group_scores(self, images, num_frames):
        yield self.conv(images).softmax(dim=1)

    def init_state(self):
        return self.new_state(ring=[])

    @torch.no_grad()
    def step(self, frame, state, hints=NO_HINTS):
        state = self.continue_state(state, frame.shape[-2:])
        images, _ = self.stack([Clip([frame])])
        entries = self.ring.push(state["ring"], {"mask_features": images, "maps": [2 * images]})
        mean = torch.stack([entry["mask_features"] for entry in self.ring.read(entries)]).mean(dim=0)
        scores = self.conv(mean).softmax(dim=1)
        return self.crop_scores(scores[0], *frame.shape[-2:]), {**state, "ring": entries}


@pytest.fixture
def averaging():
    torch.manual_seed(0)
    return Averaging().eval()


def stream(model, frames):
    state, scores = model.init_state(), []
    for frame in frames:
        score, state = model.step(frame, state)
        scores.append(score)
    return scores


def run_files(folder, manifest, kind, frames):
    """Run an exported stream from its files as a user would, by the manifest alone."""
    session = {"torch": TorchSession, "onnx": OnnxSession}[kind]
    programs = {name: session(folder / p["files"][kind]["file"]) for name, p in manifest["programs"].items()}
    first, *state = programs["start"](frames[0])
    results = [first]
    for frame in frames[1:]:
        result, *state = programs["step"](frame, *state)
        results.append(result)
    return results


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_stream_from_files(averaging, tmp_path, kind):
    """From its third frame on a stream is the segmentor's own; before, the first frame stands for the missing ones."""
    manifest = export_package(averaging, tmp_path, (22, 30), kinds=["stream"], formats=[kind])
    assert manifest == json.loads((tmp_path / "export.json").read_text())
    assert (manifest["size"], manifest["score_stride"], manifest["size_multiple"]) == ([22, 30], 2, 4)
    inputs = [x["name"] for x in manifest["programs"]["step"]["inputs"]]
    assert inputs[:3] == ["frame", "state.ring.0.mask_features", "state.ring.0.maps.0"]
    assert manifest["programs"]["step"]["outputs"][:2] == ["scores", "new_state.ring.0.mask_features"]
    frames = [moving_frame((22, 30), t) for t in range(6)]
    found = run_files(tmp_path, manifest, kind, frames)
    still = stream(averaging, [frames[0], frames[0], *frames])[2:]
    alone = stream(averaging, frames)
    for number in range(6):
        assert_close(found[number], still[number], "network")
    assert not torch.allclose(alone[1], still[1], atol=1e-3)
    assert_close(found[5], alone[5], "network")


@pytest.mark.parametrize("output", ["scores", "labels"])
def test_image_of_any_fixed_size(averaging, tmp_path, output):
    manifest = export_package(averaging, tmp_path, (21, 31), kinds=["image"], output=output)
    frame = moving_frame((21, 31), 5)
    (expected,) = averaging.score_maps([Clip([frame])])
    for kind, session in (("torch", TorchSession), ("onnx", OnnxSession)):
        (found,) = session(tmp_path / manifest["programs"]["image"]["files"][kind]["file"])(frame)
        if output == "scores":
            assert_close(found, expected[0], "network")
        else:
            (labels,) = averaging.predict([Clip([frame])])
            assert found.dtype == torch.int32
            assert torch.equal(found, labels[0].int())


def test_sizes_that_vary(averaging, tmp_path):
    manifest = export_package(averaging, tmp_path, (24, 32), kinds=["image"], dynamic=True)
    assert manifest["programs"]["image"]["sizes_may_vary"]
    frame = moving_frame((40, 16), 1)
    (expected,) = averaging.score_maps([Clip([frame])])
    for kind, session in (("torch", TorchSession), ("onnx", OnnxSession)):
        (found,) = session(tmp_path / manifest["programs"]["image"]["files"][kind]["file"])(frame)
        assert_close(found, expected[0], "network")
    with pytest.raises(ValueError, match="multiples of 4 pixels"):
        image_program(averaging, (22, 30), dynamic=True)


def test_mask_classifier_to_onnx(tmp_path):
    """Deformable attention becomes GridSample; no operator outside the standard."""
    import onnx

    model = build("debug/mask2former_debug")
    program = image_program(model, (64, 96))
    path = write_onnx(program, tmp_path)
    graph = onnx.load(path, load_external_data=False)
    assert "GridSample" in {node.op_type for node in graph.graph.node}
    assert {node.domain for node in graph.graph.node} == {""}
    frame = moving_frame((64, 96), 1)
    (expected,) = model.score_maps([Clip([frame])])
    assert_close(OnnxSession(path)(frame)[0], expected[0], "runtime")


@pytest.mark.slow
def test_swiftnet_of_any_size(tmp_path):
    """Its pooling grid follows the aspect ratio, PSP's windows the size."""
    model = build("debug/swiftnet_debug")
    program = image_program(model, (64, 96), dynamic=True)
    files = [(write_torch(program, tmp_path), TorchSession), (write_onnx(program, tmp_path), OnnxSession)]
    sessions = [session(path) for path, session in files]
    for size in ((64, 96), (96, 64), (224, 352)):
        frame = moving_frame(size, 1)
        (expected,) = model.score_maps([Clip([frame])])
        for session in sessions:
            (found,) = session(frame)
            assert_close(found, expected[0], "runtime")


def test_mask_classifier_of_any_size(tmp_path):
    """Also where scores are summed in several chunks outside exported programs (more than 65,536 cells)."""
    model = build("debug/mask2former_debug")
    program = image_program(model, (64, 96), dynamic=True)
    sessions = [to_exported(program).module(), OnnxSession(write_onnx(program, tmp_path))]
    for size in ((64, 96), (96, 64), (1024, 1152)):
        frame = moving_frame(size, 1)
        (expected,) = model.score_maps([Clip([frame])])
        for session in sessions:
            assert_close(session(frame)[0], expected[0], "runtime")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("debug/the_mask_debug_video", marks=pytest.mark.slow),
        "debug/gsvnet_debug",
        "debug/swiftnet_debug",
        "camvid/tmanet_r18_cpu",
    ],
)
def test_segmentors_through_torch_export(name, tmp_path):
    model = build(name)
    size = (64, 96)
    if name.endswith("swiftnet_debug"):
        programs = [image_program(model, size)]
        with pytest.raises(ValueError, match="keeps nothing between frames: export it as an image model"):
            stream_programs(model, size)
    else:
        programs = stream_programs(model, size)
        assert [p.name for p in programs] == ["start", "step", "key"][: 3 if "gsvnet" in name else 2]
    for program, calls in zip(programs, example_calls(programs, size, 1).values(), strict=True):
        module = to_exported(program).module()
        with exportable():
            for right, found in zip(program.module(*calls[0]), module(*calls[0]), strict=True):
                assert_close(found, right, "network")


def test_propagated_programs_are_the_stream(tmp_path):
    model = build("debug/gsvnet_debug", "MODEL.KEYFRAME.INTERVAL", "3")
    frames = [moving_frame((64, 96), t) for t in range(5)]
    programs = {p.name: p.module for p in stream_programs(model, (64, 96))}
    with exportable():
        found, *state = programs["start"](frames[0])
        results = [found]
        for number, frame in enumerate(frames[1:], start=1):
            found, *state = programs["key" if number == 3 else "step"](frame, *state)
            results.append(found)
    for found, right in zip(results, stream(model, frames), strict=True):
        assert_close(found, right, "network")


def test_states_as_tensors():
    state = {"size": [4, 6], "ring": [{"a": torch.ones(2), "none": torch.empty(0)}, {"a": torch.zeros(3)}], "x": None}
    assert [name for name, _ in states.named_tensors(state)] == ["ring.0.a", "ring.1.a"]
    filled = states.with_tensors(state, [torch.full((2,), 5.0), torch.full((3,), 6.0)])
    assert filled["ring"][1]["a"].tolist() == [6, 6, 6]
    assert (filled["size"], filled["x"], filled["ring"][0]["none"].numel()) == ([4, 6], None, 0)
    assert state["ring"][1]["a"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="3 tensors for a state with 2"):
        states.with_tensors(state, [torch.ones(2), torch.ones(3), torch.ones(1)])
    with pytest.raises(ValueError, match="still changes its layout after 5 frames"):
        states.settle(lambda s: [*s, torch.ones(1)], [], most=5)
    with pytest.raises(ValueError, match=r"state tensor 1 cannot be filled"):
        states.sources_of([torch.ones(1), torch.zeros(1)], [torch.ones(1)])


def test_a_wrong_program_is_noticed(averaging, tmp_path, monkeypatch):
    class Wrong(TorchSession):
        def __call__(self, *arguments):
            return [x + 0.01 for x in super().__call__(*arguments)]

    monkeypatch.setitem(package.SESSIONS, "torch", Wrong)
    with pytest.raises(RuntimeError, match=r"image\.pt2 differs from the model by 0\.0"):
        export_package(averaging, tmp_path, (8, 8), kinds=["image"], formats=["torch"])


def test_bad_requests(averaging, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="coreml to export: expected some of torch, onnx"):
        export_package(averaging, tmp_path, (8, 8), formats=["coreml"])
    with pytest.raises(ValueError, match="nothing to export: expected some of image, stream"):
        export_package(averaging, tmp_path, (8, 8), kinds=[])
    with pytest.raises(ValueError, match="output 'masks': expected one of scores, labels"):
        image_program(averaging, (8, 8), "masks")
    with pytest.raises(ValueError, match="size 0x8"):
        image_program(averaging, (0, 8))
    with pytest.raises(ValueError, match=r"training mode; call eval\(\)"):
        image_program(averaging.train(), (8, 8))
    monkeypatch.setattr(package.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="onnx, onnxscript, onnxruntime: pip install"):
        export_package(averaging.eval(), tmp_path, (8, 8))


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("export_tool", ROOT / "tools" / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_line(tool, tmp_path, capsys):
    config = ROOT / "configs" / "debug" / "swiftnet_debug.yaml"
    torch.save({"model": build("debug/swiftnet_debug").state_dict()}, tmp_path / "weights.pth")
    arguments = ["--config-file", str(config), "--weights", str(tmp_path / "weights.pth"), "--formats", "torch"]
    arguments += ["--output", str(tmp_path / "out"), "--kinds", "image"]
    assert tool.main([*arguments, "--size", "60x90"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"image: .*image\.pt2, largest difference \S+, 100\.000 % equal labels", printed)
    assert (tmp_path / "out" / "export.json").exists()
    assert tool.main([*arguments, "--size", "60"]) == 1
    assert "error: --size 60: expected HEIGHTxWIDTH" in capsys.readouterr().err
    assert tool.main([*arguments, "--size", "60x90", "--weights", "nowhere.pth"]) == 1
    assert "nowhere.pth" in capsys.readouterr().err


SLOW = [
    ("debug/the_mask_debug_video", (64, 96), ["stream"]),
    ("debug/gsvnet_debug", (64, 96), ["image", "stream"]),
    ("debug/swiftnet_debug", (60, 90), ["image"]),
    ("camvid/tmanet_r18_cpu", (64, 96), ["stream"]),
    ("camvid/the_mask_r18_video_cpu", (96, 128), ["image", "stream"]),
    ("vspw/mask2former_r50", (64, 96), ["image"]),
    ("vspw/the_mask_r50_video", (64, 96), ["stream"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "kinds"), SLOW)
def test_onnx_of_whole_models(name, size, kinds, tmp_path):
    """At the configs' own sizes of layers; every program is run in ONNX Runtime against the model."""
    torch.manual_seed(0)
    cfg = load_config(ROOT / "configs" / f"{name}.yaml", ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    model = build_model(cfg).eval()
    manifest = export_package(model, tmp_path, size, kinds=kinds, formats=["onnx"], tolerance=1e-2)
    for program in manifest["programs"].values():
        assert program["files"]["onnx"]["same_labels"] > 0.99


def test_sizes_of_the_command(capsys):
    spec = importlib.util.spec_from_file_location("export_tool", ROOT / "tools" / "export.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for size in ("0x96", "96x0", "96", "axb"):
        assert tool.main(["--config-file", "x.yaml", "--size", size, "--output", "x"]) != 0
        assert f"--size {size}: expected HEIGHTxWIDTH" in capsys.readouterr().err
