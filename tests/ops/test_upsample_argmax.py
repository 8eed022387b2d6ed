"""Labels of enlarged score maps on every path, against two whole interpolations and argmax in float64."""

import math

import pytest
import torch
from ops_cases import ALL_PATHS, MAIN_PATHS
from tolerances import assert_close
from torch.nn import functional as F

from the_mask.ops import extension, upsample_argmax, use
from the_mask.ops.labels.taps import axis_taps
from the_mask.ops.selection import choose

# classes, network size, output size, stride
CASES = {
    "video": (124, (48, 86), (48, 86), 4),
    "padded": (7, (45, 61), (45, 61), 8),
    "resized": (19, (48, 64), (72, 100), 4),
    "shrunk": (5, (96, 128), (20, 30), 4),
    "far shrunk": (6, (64, 300), (3, 2), 1),
    "no enlargement": (9, (30, 50), (30, 50), 1),
    "one class": (1, (9, 9), (5, 7), 2),
    "one cell": (3, (3, 2), (40, 70), 4),
    "one row": (4, (1, 200), (1, 333), 8),
    "many classes": (300, (16, 20), (33, 41), 4),
}


def two_steps(scores, network, output, stride):
    size = [side * stride for side in scores.shape[1:]]
    full = F.interpolate(scores[None].double(), size=size, mode="bilinear", align_corners=False)
    full = full[..., : network[0], : network[1]]
    return F.interpolate(full, size=output, mode="bilinear", align_corners=False)[0]


def make_scores(classes, network, stride, seed=0):
    shape = (classes, math.ceil(network[0] / stride), math.ceil(network[1] / stride))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_best(labels, full):
    """Labels are best classes, but for differences that float32 does not resolve."""
    best = full.max(dim=0).values
    chosen = full.gather(0, labels.cpu().long()[None])[0]
    assert (best - chosen).max() < 1e-5 * full.abs().max()
    assert (labels.cpu() == full.argmax(dim=0)).double().mean() > 0.999


@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize("name", CASES)
def test_labels_are_those_of_the_whole_map(path, name):
    classes, network, output, stride = CASES[name]
    scores = make_scores(classes, network, stride)
    with path.running():
        labels = upsample_argmax(scores.to(path.device), network, output, stride)
    assert labels.shape == output
    assert labels.dtype == (torch.uint8 if classes <= 255 else torch.int32)
    assert labels.device.type == path.device
    assert_best(labels, two_steps(scores, network, output, stride))


@pytest.mark.parametrize("path", ALL_PATHS)
def test_the_first_of_equal_classes_wins(path):
    scores = torch.randint(3, (40, 30, 50), generator=torch.Generator().manual_seed(0)).float()
    with path.running():
        labels = upsample_argmax(scores.to(path.device), (30, 50), (30, 50))
    assert torch.equal(labels.cpu().long(), scores.argmax(dim=0))
    with path.running():
        labels = upsample_argmax(torch.full((5, 3, 4), -7.0, device=path.device), (12, 16), (12, 16), 4)
    assert not labels.any()


@pytest.mark.parametrize("path", MAIN_PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_and_strides(path, dtype):
    scores = make_scores(11, (40, 56), 4).to(dtype)
    spread = scores.transpose(0, 2).contiguous().transpose(0, 2)
    with path.running():
        labels = upsample_argmax(spread.to(path.device), (40, 56), (45, 80), 4)
    assert_best(labels, two_steps(scores.float(), (40, 56), (45, 80), 4))


def test_threads_change_nothing():
    scores = make_scores(21, (61, 83), 4)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(upsample_argmax(scores, (61, 83), (70, 91), 4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_taps_are_the_rows_of_two_interpolations():
    for cells, stride, network, output in ((12, 4, 46, 46), (12, 4, 46, 100), (30, 2, 60, 7), (1, 8, 3, 9)):
        first, weights = axis_taps(cells, stride, network, output)
        matrix = two_steps(torch.eye(cells)[:, None], (1, network), (1, output), stride)[:, 0].t()
        found = torch.zeros(output, cells + 3, dtype=torch.float64)
        for row in range(output):
            for tap in range(weights.shape[1]):
                found[row, first[row] + tap] += float(weights[row, tap])
        assert_close(found[:, :cells].float(), matrix, "unit")
        assert not found[:, cells:].any()


@pytest.mark.parametrize("path", MAIN_PATHS)
def test_the_operator_keeps_torchs_rules(path):
    with path.running():
        scores = make_scores(6, (20, 24), 4).to(path.device)
        torch.library.opcheck(torch.ops.the_mask.upsample_argmax.default, (scores, [20, 24], [30, 17], 4))


def test_runs_in_a_compiled_function():
    def labels(scores):
        return upsample_argmax(scores * 2, (20, 24), (30, 30), 4)

    scores = make_scores(6, (20, 24), 4)
    assert torch.equal(torch.compile(labels, backend="aot_eager", fullgraph=True)(scores), labels(scores))


def test_an_older_library_runs_the_portable_path(monkeypatch):
    """Libraries without the operator go on working for the others."""
    monkeypatch.setattr(extension, "_LACKING", frozenset({"upsample_argmax"}))
    cpu = torch.device("cpu")
    if extension.LOADED.problem is None:
        assert choose(cpu, "upsample_argmax").path == "portable"
        assert choose(cpu).path == "compiled"
    scores = make_scores(6, (20, 24), 4)
    assert_best(upsample_argmax(scores, (20, 24), (20, 24), 4), two_steps(scores, (20, 24), (20, 24), 4))
    with use("compiled"), pytest.raises(RuntimeError, match="no compiled path"):
        upsample_argmax(scores, (20, 24), (20, 24), 4)


@pytest.mark.parametrize(
    ("scores", "network", "output", "stride", "message"),
    [
        (torch.zeros(3, 4), (4, 4), (4, 4), 1, "expected 3 axes"),
        (torch.zeros(0, 4, 4), (4, 4), (4, 4), 1, "not empty"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), (4, 4), (4, 4), 1, "expected floats"),
        (torch.zeros(3, 4, 4), (17, 16), (4, 4), 4, "a height of 17 pixels at stride 4 needs 5 cells"),
        (torch.zeros(3, 4, 4), (16, 16), (0, 4), 4, "expected at least 1"),
        (torch.zeros(3, 4, 4), (16, 16), (4, 4), 0, "expected at least 1"),
    ],
)
def test_bad_input(scores, network, output, stride, message):
    with pytest.raises(ValueError, match=message):
        upsample_argmax(scores, network, output, stride)


def test_the_kernel_does_not_trust_cells():
    """What memory safety rests on is checked in C++, whoever calls the private operator."""
    if extension.missing_for("cpu", "upsample_argmax") is not None:
        pytest.skip("no compiled path")
    kernel = torch.ops.the_mask_kernels.upsample_argmax
    scores, weights = torch.zeros(2, 3, 3), torch.ones(4, 2)
    good, bad = torch.zeros(4, dtype=torch.int32), torch.tensor([0, 0, 0, 2], dtype=torch.int32)
    assert kernel(scores, good, weights, good, weights).shape == (4, 4)
    for arguments in ((scores, bad, weights, good, weights), (scores, good, weights, bad - 3, weights)):
        with pytest.raises(RuntimeError, match="reads cell"):
            kernel(*arguments)
