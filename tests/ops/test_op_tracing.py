"""The operators under torch's tracers: opcheck, fake tensors, torch.compile, torch.export, exporters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops_cases import DCN_CASES, MAIN_PATHS, MSDA_CASES, Path
from tolerances import assert_close
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from the_mask.ops import DCNv3, MSDeformAttn, dcnv3, decomposed, ms_deform_attn

LEVELS = [(4, 6), (2, 3)]
COMPILED_OR_PORTABLE = [path for path in MAIN_PATHS if path.values[0].mode != "reference"]


class Both(nn.Module):
    """A layer of each operator in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = MSDeformAttn(16, 2, 2, 2)
        self.convolution = DCNv3(16, 2, center_feature_scale=True)
        nn.init.normal_(self.convolution.offset.weight, std=0.2)
        nn.init.normal_(self.attention.sampling_offsets.weight, std=0.2)

    def forward(self, query: Tensor, references: Tensor) -> Tensor:
        attended = self.attention(query, references, query, LEVELS)
        return self.convolution(attended[:, :24].unflatten(1, (4, 6)))


def both() -> tuple[Both, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Both(), (torch.randn(2, 30, 16), torch.rand(2, 30, 2, 2))


def msda_operator_arguments(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    case = MSDA_CASES[1]
    value, locations, weights = case.arguments(dtype)
    return value, [size for pair in case.levels for size in pair], locations, weights


def dcn_operator_arguments(center: bool) -> tuple[Any, ...]:
    case = DCN_CASES[1]
    x, offset, mask, share = case.arguments(torch.float32)
    return x, offset, mask, share if center else None, *(list(part) for part in case.geometry[:4]), *case.geometry[4:]


@pytest.mark.parametrize("path", MAIN_PATHS)
def test_opcheck(path: Path):
    with path.running():
        operators = torch.ops.the_mask
        torch.library.opcheck(operators.ms_deform_attn.default, msda_operator_arguments())
        value, sizes, locations, weights = msda_operator_arguments(torch.bfloat16)
        torch.library.opcheck(operators.ms_deform_attn.default, (value, sizes, locations, weights))
        shapes = torch.tensor(sizes).view(-1, 2)
        torch.library.opcheck(operators.ms_deform_attn.default, (value, [], locations, weights, shapes))
        for center in (False, True):
            torch.library.opcheck(operators.dcnv3.default, dcn_operator_arguments(center))
        grad = torch.randn(2, 40, 96)
        with torch.no_grad():
            torch.library.opcheck(
                operators.ms_deform_attn_backward.default,
                (grad, *msda_operator_arguments()),
                test_utils=("test_schema", "test_faketensor"),
            )
            x, *rest = dcn_operator_arguments(True)
            torch.library.opcheck(
                operators.dcnv3_backward.default,
                (torch.randn_like(x), x, *rest),
                test_utils=("test_schema", "test_faketensor"),
            )


@pytest.mark.parametrize("path", MAIN_PATHS)
def test_registered_operators_work_on_every_path(path: Path):
    """torch.ops.the_mask gives what the functions give, with its own gradients, whatever runs below."""
    with path.running():
        value, sizes, locations, weights = msda_operator_arguments()
        expected = ms_deform_attn(value, MSDA_CASES[1].levels, None, locations, weights)
        found = torch.ops.the_mask.ms_deform_attn(value, sizes, locations, weights)
        torch.testing.assert_close(found, expected)
        leaves = (value, locations, weights)
        for mine, wanted in zip(
            torch.autograd.grad(found.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
        ):
            assert_close(mine, wanted, "peer")
        arguments = dcn_operator_arguments(True)
        expected = dcnv3(*arguments[:3], *arguments[4:10], remove_center=False, center_feature_scale=arguments[3])
        found = torch.ops.the_mask.dcnv3(*arguments)
        torch.testing.assert_close(found, expected)
        for mine, wanted in zip(
            torch.autograd.grad(found.square().sum(), arguments[:4]),
            torch.autograd.grad(expected.square().sum(), arguments[:4]),
        ):
            assert_close(mine, wanted, "peer")


@pytest.mark.parametrize("path", MAIN_PATHS)
def test_fake_and_meta_tensors(path: Path):
    with path.running():
        with FakeTensorMode() as mode:
            model, inputs = both()
            output = model(*inputs)
            assert output.shape == (2, 4, 6, 16)
            assert output.fake_mode is mode
        with torch.device("meta"):
            model = Both()
            assert model(torch.empty(2, 30, 16), torch.empty(2, 30, 2, 2)).shape == (2, 4, 6, 16)


def test_shapes_as_a_tensor_while_tracing():
    """A tensor of shapes that cannot be read is handed on unread; on the CPU it is read when the program runs."""
    with Path("compiled").running():
        case = MSDA_CASES[1]
        value, locations, weights = case.arguments(torch.float32)
        shapes = torch.tensor(case.levels)

        def function(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return ms_deform_attn(value, shapes, None, locations, weights)

        traced = torch.compile(function, backend="aot_eager", fullgraph=True)
        expected = ms_deform_attn(value, case.levels, None, locations, weights)
        torch.testing.assert_close(traced(value, shapes, locations, weights), expected)
        with pytest.raises(ValueError, match="value has shape"):
            traced(value, shapes + 1, locations, weights)


def compare_compiled(backend: str, dynamic: bool | None) -> None:
    model, inputs = both()
    expected = model(*inputs)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    torch._dynamo.reset()
    traced = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    output = traced(*inputs)
    assert_close(output, expected, "network")
    grads = torch.autograd.grad(output.square().sum(), list(model.parameters()))
    for found, wanted in zip(grads, expected_grads):
        assert_close(found, wanted, "runtime")


@pytest.mark.parametrize("path", COMPILED_OR_PORTABLE)
def test_compile_without_code_generation(path: Path):
    with path.running():
        compare_compiled("aot_eager", None)


@pytest.mark.slow
@pytest.mark.parametrize("path", COMPILED_OR_PORTABLE)
def test_compile_with_inductor(path: Path):
    with path.running():
        compare_compiled("inductor", None)


def operators_in(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def test_export_keeps_the_operators():
    with Path("compiled").running(), torch.no_grad():
        model, inputs = both()
        program = torch.export.export(model.eval(), inputs)
        assert {"the_mask.ms_deform_attn.default", "the_mask.dcnv3.default"} <= operators_in(program)
        torch.testing.assert_close(program.module()(*inputs), model(*inputs))


def test_export_decomposed():
    """Only standard operators are left, whatever path runs otherwise, and the values are the kernels'."""
    model, inputs = both()
    with torch.no_grad():
        expected = model.eval()(*inputs)
        with decomposed():
            program = torch.export.export(model, inputs)
    names = operators_in(program)
    assert "aten.grid_sampler.default" in names or "aten.grid_sampler_2d.default" in names
    assert not any(name.startswith("the_mask") for name in names)
    assert_close(program.module()(*inputs), expected, "network")


def test_export_decomposed_with_dynamic_batch():
    model, inputs = both()
    batch = torch.export.Dim("batch", min=1, max=64)
    with decomposed(), torch.no_grad():
        program = torch.export.export(model.eval(), inputs, dynamic_shapes=({0: batch}, {0: batch}))
    more = (torch.randn(5, 30, 16), torch.rand(5, 30, 2, 2))
    assert_close(program.module()(*more), model(*more), "network")


@pytest.mark.slow
def test_onnx():
    """ONNX files hold GridSample; onnxruntime computes the same."""
    pytest.importorskip("onnxscript")
    model, inputs = both()
    with decomposed(), torch.no_grad():
        program = torch.onnx.export(model.eval(), inputs, dynamo=True)
    assert program is not None
    assert any(node.op_type == "GridSample" for node in program.model.graph)
    pytest.importorskip("onnxruntime")
    assert_close(program(*inputs)[0], model(*inputs), "runtime")


def torch_differentiates_grid_sample_twice() -> bool:
    image, grid = torch.ones(1, 1, 2, 2, requires_grad=True), torch.zeros(1, 1, 1, 2, requires_grad=True)
    output = torch.nn.functional.grid_sample(image, grid, align_corners=False)
    (first,) = torch.autograd.grad(output.square().sum(), image, create_graph=True)
    try:
        torch.autograd.grad(first.sum(), image)
    except RuntimeError as error:
        if "grid_sampler_2d_backward is not implemented" not in str(error):
            raise
        return False
    return True


def test_double_backward_and_transforms_when_decomposed():
    """What the kernels do not have, the decomposition has."""
    if not torch_differentiates_grid_sample_twice():
        pytest.skip(f"torch {torch.__version__} has no second derivative of grid_sample")
    model, (query, references) = both()
    with decomposed():
        query = query.double().requires_grad_()
        model, references = model.double(), references.double()
        (first,) = torch.autograd.grad(model(query, references).square().sum(), query, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), query)
        assert bool(torch.isfinite(second).all())
        jacobian = torch.func.jacrev(lambda image: model.convolution(image).sum())(torch.randn(1, 3, 4, 16).double())
        assert jacobian.shape == (1, 3, 4, 16)
