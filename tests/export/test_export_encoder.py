"""Encoder-only models as exported programs, in torch and ONNX, against the eager stream."""

import sys
from pathlib import Path

import pytest
import torch
from tolerances import assert_close

from the_mask.data.clips import Clip

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "modeling"))

from encoder_cases import tiny_segmentor

from the_mask.export.programs import exportable, image_program, stream_programs

VIDEO = ("MODEL.ENCODER.PROPAGATE", True, "MODEL.ENCODER.MASKED_ATTENTION", False)
SIZE = (48, 80)


def frames(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (3, *SIZE), generator=generator).float() for _ in range(count)]


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_exported_stream_equals_eager(kind):
    model = tiny_segmentor(kind, *VIDEO)
    start, step = stream_programs(model, SIZE)
    assert (start.name, step.name) == ("start", "step")
    assert step.inputs == ["frame", "state.queries", "state.class_sum", "state.count"]
    with exportable():
        exported = [torch.export.export(p.module, p.arguments, strict=False).module() for p in (start, step)]
        state = model.init_state()
        tensors = None
        for frame in frames(4):
            expected, state = model.step(frame, state)
            found, *tensors = exported[0](frame) if tensors is None else exported[1](frame, *tensors)
            assert_close(found, expected, "layer")
    for own, other in zip(("queries", "class_sum", "count"), tensors, strict=True):
        assert_close(other, state[own], "layer")


def test_onnx_stream_equals_eager(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = tiny_segmentor("dinov2", *VIDEO)
    sessions = []
    with exportable():
        for program in stream_programs(model, SIZE):
            path = tmp_path / f"{program.name}.onnx"
            torch.onnx.export(
                program.module,
                program.arguments,
                str(path),
                dynamo=True,
                input_names=program.inputs,
                output_names=program.outputs,
                verbose=False,
            )
            sessions.append((runtime.InferenceSession(str(path)), program))
    state, tensors = model.init_state(), None
    for frame in frames(3):
        expected, state = model.step(frame, state)
        session, program = sessions[0] if tensors is None else sessions[1]
        values = [frame.numpy(), *(tensors or [])]
        found, *tensors = session.run(None, dict(zip(program.inputs, values, strict=True)))
        assert_close(torch.from_numpy(found), expected, "peer")


def test_image_model_exports_as_an_image():
    model = tiny_segmentor("dinov2")
    program = image_program(model, SIZE)
    (frame,) = frames(1)
    with exportable():
        exported = torch.export.export(program.module, program.arguments, strict=False).module()
        (found,) = exported(frame)
    assert_close(found, model.score_maps([Clip([frame])])[0][0], "layer")
    with pytest.raises(ValueError, match="keeps nothing between frames"):
        stream_programs(model, SIZE)
