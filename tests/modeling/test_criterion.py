"""The criterion against transformers' Mask2Former loss and against loops in float64."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from criterion_cases import K, Q, leaves, make_criterion, make_label, make_outputs, make_targets, naive_loss, scalars
from tolerances import approx, assert_close

from the_mask.config import load_config
from the_mask.config.keys.mask_former import HierarchyOptions, LossOptions
from the_mask.modeling.mask import criterion as module
from the_mask.modeling.mask import losses
from the_mask.modeling.mask.criterion import MaskCriterion
from the_mask.modeling.mask.matching import match_all
from the_mask.modeling.mask.points import point_generator
from the_mask.modeling.mask.targets import clip_targets


@pytest.fixture
def fixed_points(monkeypatch):
    """Every map is sampled at the same points, so that the order in which maps are drawn does not matter."""
    points = torch.rand(1, 64, 2, generator=torch.Generator().manual_seed(99))
    monkeypatch.setattr(module, "importance_points", lambda maps, *a, **k: points.expand(len(maps), -1, -1))
    return points


@pytest.mark.parametrize("void", [0.0, 0.3])
def test_one_round_equals_transformers(monkeypatch, fixed_points, void):
    """Hugging Face's matcher and loss, given the same points, on all prediction sets (255 is background there)."""
    transformers = pytest.importorskip("transformers")
    reference = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    outputs, targets, seeds = make_outputs(), make_targets(void=void), [5, 6]
    ours = make_criterion(valid_mask=False)(outputs, targets, seeds)

    config = transformers.Mask2FormerConfig(num_labels=K, train_num_points=64)
    config.num_labels = K
    loss = reference.Mask2FormerLoss(config, {})
    monkeypatch.setattr(
        loss, "sample_points_using_uncertainty", lambda maps, *a: fixed_points.expand(len(maps), -1, -1)
    )
    draws = [torch.rand(3, 64, 2, generator=point_generator(seed, 0)) for seed in seeds]
    queue = [draws[b][s][None] for s in (2, 0, 1) for b in range(2)]  # the final set comes first there
    monkeypatch.setattr(torch, "rand", lambda *a, **k: queue.pop(0))
    theirs = loss(
        outputs["pred_masks"][:, :, 0],
        outputs["pred_logits"],
        [t.masks()[:, 0].float() for t in targets],
        [t.labels for t in targets],
        [
            {"masks_queries_logits": a["pred_masks"][:, :, 0], "class_queries_logits": a["pred_logits"]}
            for a in outputs["aux_outputs"]
        ],
    )
    assert not queue
    assert len(ours) == len(theirs) == 9
    for name, value in ours.items():
        other = name.replace("loss_ce", "loss_cross_entropy")
        weight = 2.0 if "_ce" in name else 5.0
        assert_close(value, weight * theirs[other], "network")
    gradients = torch.autograd.grad(sum(ours.values()), leaves(outputs))
    total = sum((2.0 if "cross" in k else 5.0) * v for k, v in theirs.items())
    for got, want in zip(gradients, torch.autograd.grad(total, leaves(outputs)), strict=True):
        assert_close(got, want, "gradient")


CASES = {
    "image": ({}, {"frames": 1}),
    "image, void": ({}, {"frames": 1, "void": 0.3}),
    "image, void is background": ({"valid_mask": False}, {"frames": 1, "void": 0.3}),
    "two rounds": ({"rounds": 2}, {"frames": 1, "void": 0.2}),
    "two rounds, bce, void is background": (
        {"rounds": 2, "second_round_cost": "bce", "valid_mask": False},
        {"frames": 1, "void": 0.2},
    ),
    "secondary classes count less": ({"rounds": 3, "secondary_class_weight": 0.2}, {"frames": 2, "frame_branch": True}),
    "clip, three rounds": ({"rounds": 3}, {"frames": 2, "void": 0.2}),
    "clip with frame branch": ({"rounds": 2}, {"frames": 3, "void": 0.2, "frame_branch": True}),
    "too many targets": ({"rounds": 2}, {"frames": 2, "queries": 4, "frame_branch": True}),
    "an unlabelled frame": ({"rounds": 2}, {"frames": 2, "drop": True, "frame_branch": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_naive_loss(case, fixed_points, monkeypatch):
    options, shape = CASES[case]
    branch, frames = shape.get("frame_branch", False), shape["frames"]
    outputs = make_outputs(3, 2, frames, 2, branch, queries=shape.get("queries", Q))
    targets = make_targets(2, frames, shape.get("void", 0.0))
    if shape.get("drop"):
        labels = [make_label(0), None]
        targets[0] = clip_targets(labels, 255, K)
        targets[1] = clip_targets([None, torch.full((32, 40), 255)], 255, K)
    found = []
    monkeypatch.setattr(module, "match_all", lambda costs, *a: found.extend(costs) or match_all(costs, *a))
    got = make_criterion(**options)(outputs, targets, [1, 2])
    want, costs = naive_loss(outputs, targets, [1, 2], options, fixed_points)
    for a, b in zip(found, costs, strict=True):
        assert_close(a, b, "network")
    assert set(got) == set(want)
    for name in want:
        assert got[name].dtype == torch.float32
        assert got[name].item() == approx(want[name].item(), "network"), name
    gradients = torch.autograd.grad(sum(got.values()), leaves(outputs), allow_unused=True)
    expected = torch.autograd.grad(sum(want.values()), leaves(outputs), allow_unused=True, materialize_grads=True)
    for a, b in zip(gradients, expected, strict=True):
        assert a is not None, "every output must stay in the graph"
        assert_close(a, b, "gradient")


def test_sampled_secondary_loss_estimates_the_dense_one():
    outputs, targets = make_outputs(sets=1), make_targets(void=0.2)
    dense = scalars(make_criterion(rounds=2)(outputs, targets, [1, 2]))
    sampled = scalars(make_criterion(rounds=2, secondary_num_points=200_000)(outputs, targets, [1, 2]))
    for name in dense:
        assert sampled[name] == pytest.approx(dense[name], rel=0.02)
    assert sampled["loss_mask_secondary"] != dense["loss_mask_secondary"]
    assert sampled["loss_mask"] == dense["loss_mask"]


@pytest.mark.parametrize("points", [0, 500])
@pytest.mark.parametrize("valid_mask", [True, False])
def test_secondary_loss_never_pushes_logits_up_outside_confident_truth(points, valid_mask):
    criterion = make_criterion(
        rounds=2, class_weight=0.0, primary_weight=0.0, secondary_num_points=points, valid_mask=valid_mask
    )
    for seed in range(5):
        outputs, targets = make_outputs(seed, frames=2, sets=1), make_targets(frames=2, void=0.2)
        total = sum(criterion(outputs, targets, [seed, seed + 1]).values())
        (gradient,) = torch.autograd.grad(total, outputs["pred_masks"])
        unsure = outputs["pred_masks"] <= 0
        assert (gradient[unsure] >= 0).all(), "descent would raise a logit whose probability is at most one half"
        assert (gradient < 0).any(), "confident true pixels must still be sharpened"


def test_frame_branch_with_the_clip_branch_s_masks_has_a_quarter_of_its_losses(fixed_points):
    """The divisors of both branches agree: one counts clips times frames, the other frames."""
    outputs, targets = make_outputs(frames=3), make_targets(frames=3)
    outputs["frame"] = copy.copy(outputs)
    outputs["frame"]["aux_outputs"] = [dict(a) for a in outputs["aux_outputs"]]
    for s in [outputs["frame"], *outputs["frame"]["aux_outputs"]]:
        s["pred_logits"] = s["pred_logits"].unsqueeze(1).expand(-1, 3, -1, -1)
    result = scalars(make_criterion(rounds=2)(outputs, targets, [1, 2]))
    for name in [n for n in result if not n.startswith("frame_")]:
        assert result["frame_" + name] == approx(0.25 * result[name], "formula")
    assert len(result) == 30


def test_valid_mask_changes_nothing_without_ignored_pixels():
    outputs, targets = make_outputs(frames=2), make_targets(frames=2)
    on = scalars(make_criterion(rounds=2)(outputs, targets, [1, 2]))
    off = scalars(make_criterion(rounds=2, valid_mask=False)(outputs, targets, [1, 2]))
    assert on == off


def test_ignored_pixels_do_not_matter():
    """With the valid mask, logits under ignored pixels move no mask loss (away from the border's bilinear reach)."""
    label = make_label(3)
    label[:, 24:] = 255
    targets = [clip_targets([label], 255, K)]
    outputs = make_outputs(clips=1)
    changed = copy.deepcopy(outputs)
    for s in [changed, *changed["aux_outputs"]]:
        with torch.no_grad():
            s["pred_masks"][..., 8:] = 50.0  # cells 8, 9 lie at pixels 32..39; the reach of 24 ends before them
    for options in ({"importance_sample_ratio": 0.0}, {"importance_sample_ratio": 0.0, "rounds": 2}):
        criterion = make_criterion(**options)
        first, second = criterion(outputs, targets, [1]), criterion(changed, targets, [1])
        assert scalars(first) == approx(scalars(second), "formula")
        without = make_criterion(**options, valid_mask=False)(changed, targets, [1])
        assert without["loss_mask"].item() > first["loss_mask"].item() + 1


def test_a_clip_s_losses_do_not_depend_on_its_batch(monkeypatch):
    """Two ranks with one clip each, normalisers averaged as all-reduce would, equal one process with both clips."""
    outputs, targets = make_outputs(frames=2, frame_branch=True), make_targets(frames=2, void=0.3)
    targets[1] = clip_targets([make_label(11), None], 255, K)
    criterion = make_criterion(rounds=2, train_num_points=200)
    together = criterion(outputs, targets, [8, 9])

    def part(b):
        cut = lambda s: {k: v[b : b + 1] for k, v in s.items() if k.startswith("pred_")}  # noqa: E731
        branch = lambda o: {**cut(o), "aux_outputs": [cut(a) for a in o["aux_outputs"]]}  # noqa: E731
        return {**branch(outputs), "frame": branch(outputs["frame"])}, targets[b : b + 1], [8 + b]

    seen: list[list[torch.Tensor]] = []
    for b in range(2):
        seen.append([])
        monkeypatch.setattr(losses, "mean_over_ranks", lambda v: seen[-1].append(v) or v)
        criterion(*part(b))
    means = [(x + y) / 2 for x, y in zip(*seen, strict=True)]
    assert len(means) == 4  # class weights and maps, clip and frame branch
    parts = []
    for b in range(2):
        queue = list(means)
        monkeypatch.setattr(losses, "mean_over_ranks", lambda v, queue=queue: queue.pop(0))
        parts.append(criterion(*part(b)))
    for name, value in together.items():
        # Gradients are averaged over ranks, and so are losses.
        assert value.item() == approx((parts[0][name] + parts[1][name]).item() / 2, "sum"), name


def test_order_of_queries_does_not_matter():
    outputs, targets = make_outputs(frames=2, frame_branch=True), make_targets(frames=2)
    order = torch.randperm(Q, generator=torch.Generator().manual_seed(4))
    shuffle = lambda s: {"pred_logits": s["pred_logits"][..., order, :], "pred_masks": s["pred_masks"][:, order]}  # noqa: E731
    shuffled = {**shuffle(outputs), "aux_outputs": [shuffle(a) for a in outputs["aux_outputs"]]}
    frame = outputs["frame"]
    shuffled["frame"] = {**shuffle(frame), "aux_outputs": [shuffle(a) for a in frame["aux_outputs"]]}
    criterion = make_criterion(rounds=2)
    first, second = scalars(criterion(outputs, targets, [1, 2])), scalars(criterion(shuffled, targets, [1, 2]))
    assert first == approx(second, "sum")


def test_seeds_decide_the_points():
    outputs, targets = make_outputs(), make_targets()
    criterion = make_criterion()
    first = scalars(criterion(outputs, targets, [1, 2]))
    torch.rand(10)
    assert scalars(criterion(outputs, targets, [1, 2])) == first
    assert scalars(criterion(outputs, targets, [1, 3])) != first
    torch.manual_seed(0)
    unseeded = scalars(criterion(outputs, targets))
    torch.manual_seed(0)
    assert scalars(criterion(outputs, targets)) == unseeded


def test_every_use_of_points_has_its_own_stream(monkeypatch):
    outputs, targets, used = make_outputs(frame_branch=True), make_targets(), []

    def spy(seed, stream, device):
        used.append((seed, stream))
        return point_generator(seed, stream, device)

    monkeypatch.setattr(module, "point_generator", spy)
    make_criterion(rounds=2)(outputs, targets, [1, 2])
    # Matching, and primary and secondary losses of two branches, for each clip.
    assert len(used) == len(set(used)) == 10


@pytest.mark.parametrize("labels", [[None, None], [torch.full((32, 40), 255)] * 2])
def test_a_batch_without_targets_gives_zeros_in_the_graph(labels):
    outputs = make_outputs(frames=2, frame_branch=True)
    targets = [clip_targets(labels, 255, K, (32, 40)) for _ in range(2)]
    criterion = make_criterion(rounds=2)
    result = criterion(outputs, targets, [1, 2])
    assert all(v.item() == 0 for v in result.values())
    gradients = torch.autograd.grad(sum(result.values()), leaves(outputs))
    assert all((g == 0).all() for g in gradients)
    assert criterion.last_stats["videos"] == []
    assert criterion.last_stats["positive_all"] == 0.0


def test_void_clip_is_all_no_object_without_the_valid_mask():
    """The released behaviour: an empty clip still teaches that every query is no-object."""
    outputs = make_outputs(clips=1)
    result = make_criterion(valid_mask=False)(outputs, [clip_targets([torch.full((32, 40), 255)], 255, K)], [1])
    expected = 2 * F.cross_entropy(outputs["pred_logits"][0], torch.full((Q,), K))
    torch.testing.assert_close(result["loss_ce"], expected)
    assert result["loss_mask"].item() == 0


def test_more_targets_than_queries_are_counted():
    outputs, targets = make_outputs(queries=4), make_targets()
    criterion = make_criterion(rounds=2)
    criterion(outputs, targets, [1, 2])
    assert [t.num_targets for t in targets] == [6, 6]
    stats = criterion.last_stats
    assert stats["unmatched_targets"] == 2 * (2 * 6 - 4)
    assert stats["positive_round1"] == stats["positive_all"] == 1.0


def test_stats_say_how_many_queries_are_positive():
    outputs, targets = make_outputs(), make_targets()
    targets[0] = clip_targets([make_label(0, classes=2)], 255, K, name="d/v1")
    criterion = make_criterion(rounds=2)
    criterion(outputs, targets, [1, 2])
    stats = criterion.last_stats
    assert stats["mode"] == "hierarchical"
    assert stats["rounds"] == 2
    assert stats["videos"][0] == {"name": "d/v1", "positive_round1": 2 / 12, "positive_all": 4 / 12}
    assert stats["videos"][1]["positive_all"] == 1.0
    assert stats["positive_round1"] == pytest.approx((2 + 6) / 24)
    assert stats["positive_all"] == pytest.approx((4 + 12) / 24)
    assert stats["unmatched_targets"] == stats["nonfinite_costs"] == 0


def test_warm_up_is_driven_by_the_iteration():
    outputs, targets = make_outputs(), make_targets()
    plain = scalars(make_criterion(rounds=1)(outputs, targets, [1, 2]))
    two = scalars(make_criterion(rounds=2)(outputs, targets, [1, 2]))
    criterion = make_criterion(rounds=2, warmup_iters=30)
    assert scalars(criterion(outputs, targets, [1, 2], iteration=29)) == plain
    assert criterion.last_stats["mode"] == "primary"
    assert criterion.last_stats["positive_all"] == criterion.last_stats["positive_round1"]
    assert scalars(criterion(outputs, targets, [1, 2], iteration=30)) == two
    assert criterion.last_stats["mode"] == "hierarchical"
    reference = make_criterion(rounds=2, warmup_iters=30, warmup_mode="reference")
    assert scalars(reference(outputs, targets, [1, 2], iteration=10**6)) == plain
    assert make_criterion(rounds=2, warmup_mode="reference").mode(0) == "hierarchical"
    assert make_criterion(rounds=1).mode(10**6) == "primary"


def test_nan_predictions_are_matched_reported_once_and_counted(caplog):
    outputs, targets = make_outputs(), make_targets()
    with torch.no_grad():
        outputs["aux_outputs"][1]["pred_masks"][1] = float("nan")
    criterion = make_criterion(rounds=2)
    with caplog.at_level(logging.WARNING):
        result = criterion(outputs, targets, [1, 2])
        criterion(outputs, targets, [1, 2])
    assert len(caplog.records) == 1
    assert "auxiliary prediction 1 of clip clip1" in caplog.records[0].message
    assert criterion.last_stats["nonfinite_costs"] == 1
    assert criterion.nonfinite_total == 2
    # The other sets are untouched; the guard on non-finite losses is the trainer's.
    assert {name for name, v in result.items() if not v.isfinite()} == {
        "loss_mask_1", "loss_dice_1", "loss_mask_secondary_1", "loss_dice_secondary_1"
    }  # fmt: skip


def test_low_precision_outputs_give_float32_losses():
    outputs, targets = make_outputs(frames=2), make_targets(frames=2)
    half = {
        k: v.bfloat16() if torch.is_tensor(v) else [{n: x.bfloat16() for n, x in a.items()} for a in v]
        for k, v in outputs.items()
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = make_criterion(rounds=2)(half, targets, [1, 2])
    exact = make_criterion(rounds=2)(outputs, targets, [1, 2])
    for name, value in result.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[name].item(), rel=0.2, abs=0.05)


def test_state_dict_and_config():
    assert list(make_criterion().state_dict()) == ["empty_weight"]
    weights = make_criterion(no_object_weight=0.3).empty_weight
    torch.testing.assert_close(weights, torch.tensor([1.0] * K + [0.3]))
    cfg = load_config(
        overrides=["MODEL.THE_MASK.ROUNDS", "2", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "124", "MODEL.DEVICE", "cpu"]
    )
    built = MaskCriterion(cfg)
    assert built.hierarchy.rounds == 2
    assert built.empty_weight.shape == (125,)
    assert (built.options, built.hierarchy) == (LossOptions(), HierarchyOptions(rounds=2))
    weights = built.options
    assert (weights.class_weight, weights.mask_weight, weights.dice_weight) == (2.0, 5.0, 5.0)
    assert (weights.train_num_points, weights.oversample_ratio, weights.importance_sample_ratio) == (12544, 3.0, 0.75)
    later = built.hierarchy
    assert (later.primary_weight, later.secondary_weight, later.frame_weight) == (1.0, 0.5, 0.25)


@pytest.mark.parametrize(
    "bad", [{"rounds": 0}, {"second_round_cost": "dice"}, {"warmup_mode": "never"}], ids=lambda b: next(iter(b))
)
def test_bad_options_are_refused(bad):
    with pytest.raises(ValueError, match=r"MODEL\.THE_MASK"):
        make_criterion(**bad)


def test_outputs_and_targets_that_do_not_fit_are_refused():
    criterion = make_criterion()
    with pytest.raises(ValueError, match="B = 1 clips"):
        criterion(make_outputs(), make_targets(1), [1])
    with pytest.raises(ValueError, match="T=1"):
        criterion(make_outputs(), make_targets(frames=2), [1, 2])
    mixed = make_outputs(frame_branch=True)
    mixed["frame"]["aux_outputs"] = []
    with pytest.raises(ValueError, match="as many prediction sets"):
        criterion(mixed, make_targets(), [1, 2])
