"""Classes per frame, and targets that keep the query of their first frame, against loops in float64."""

import pytest
import torch
import torch.nn.functional as F
from criterion_cases import K, Q, make_criterion, make_outputs, smooth
from tolerances import assert_close

from the_mask.modeling.mask import criterion as module
from the_mask.modeling.mask.points import point_generator, point_sample
from the_mask.modeling.mask.targets import clip_targets

FRAMES, SEEDS = 3, [5, 6]


def label_map(columns):
    """One class per column of a 32 x 40 map."""
    return torch.tensor(columns).repeat_interleave(40 // len(columns))[None].expand(32, -1).contiguous()


def make_targets():
    """Classes come and go; frame 1 of the second clip has no labels."""
    first = [label_map([0, 1, 255, 1]), label_map([0, 2, 2, 1]), label_map([3, 3, 3, 2])]
    second = [label_map([4, 4, 4, 4]), None, label_map([5, 4, 0, 0])]
    return [clip_targets(labels, 255, K, name=f"clip{b}") for b, labels in enumerate((first, second))]


def per_frame_outputs(seed=0, sets=3):
    generator = torch.Generator().manual_seed(seed)
    made = [
        {
            "pred_logits": torch.randn(2, FRAMES, Q, K + 1, generator=generator).requires_grad_(),
            "pred_masks": smooth(generator, 2, Q, FRAMES, 8, 10).requires_grad_(),
        }
        for _ in range(sets)
    ]
    return {**made[-1], "aux_outputs": made[:-1]}


def dense(target, t, points):
    """Bilinear samples [N + 1, P] of the targets' masks and of the ignored pixels, float64."""
    bits = torch.stack([target.mask(n, t) for n in range(target.num_targets + 1)]).double()
    return point_sample(bits[None], points.double()[None])[0]


def costs(logits, masks, truth, label):
    """Cost [Q] of one target in one frame: class, BCE and dice."""
    valid = 1 - truth["ignored"] / (truth["ignored"] + truth["all"])
    x, t = masks.double(), truth["own"]
    bce = (valid * F.softplus(x) - t * x).sum(1) / valid.sum()
    p = x.sigmoid()
    dice = 1 - (2 * (p * t).sum(1) + 1) / ((p * valid).sum(1) + t.sum() + 1)
    return -2 * logits.double().softmax(-1)[:, label] + 5 * bce + 5 * dice


def match(output, b, target, points, rounds):
    """{target: query} per round, target by target in the order of first frames (ties: all permutations)."""
    from the_mask.modeling.mask.matching import assign

    frames = [t for t in range(FRAMES) if target.labelled[t]]
    firsts = [min(t for t in frames if (target.index_map[t] == n).any()) for n in range(target.num_targets)]
    columns = []
    for n, t in enumerate(firsts):
        sampled = dense(target, t, points)
        masks = point_sample(output["pred_masks"][b, :, t][None], points[None])[0]
        truth = {"own": sampled[n], "ignored": sampled[-1], "all": sampled[:-1].sum(0)}
        columns.append(costs(output["pred_logits"][b, t], masks, truth, target.labels[n]))
    pairs = assign(torch.stack(columns, 1), rounds, order=firsts)
    return [dict(zip(n.tolist(), q.tolist(), strict=True)) for q, n in pairs]


@pytest.mark.parametrize("rounds", [1, 2])
def test_loss_equals_loops(monkeypatch, rounds):
    fixed = torch.rand(1, 64, 2, generator=torch.Generator().manual_seed(99))
    monkeypatch.setattr(module, "importance_points", lambda maps, *a, **k: fixed.expand(len(maps), -1, -1))
    outputs, targets = per_frame_outputs(), make_targets()
    criterion = make_criterion(matching="first-frame", rounds=rounds)
    found = criterion(outputs, targets, SEEDS)
    sets = [*outputs["aux_outputs"], outputs]
    drawn = [torch.rand(3, 64, 2, generator=point_generator(seed, 0)) for seed in SEEDS]
    for s, output in enumerate(sets):
        suffix = "" if s == 2 else f"_{s}"
        ce = weight = bce = dice = 0.0
        count = 0
        for b, target in enumerate(targets):
            matched = match(output, b, target, drawn[b][s], rounds)
            for t in range(FRAMES):
                if not target.labelled[t]:
                    continue
                shown = [n for n in range(target.num_targets) if (target.index_map[t] == n).any()]
                count += len(shown)
                classes = torch.full((Q,), K)
                for pairs in matched:
                    for n in shown:
                        classes[pairs[n]] = target.labels[n]
                w = torch.where(classes == K, 0.1, 1.0).double()
                log_p = output["pred_logits"][b, t].double().log_softmax(-1)
                ce = ce - (w * log_p[torch.arange(Q), classes]).sum()
                weight += float(w.sum())
                sampled = dense(target, t, fixed[0])
                void = point_sample(target.mask(target.num_targets, t)[None, None].double(), fixed.double(), "border")
                valid = 1 - void[0, 0] if bool((target.index_map[t] == target.num_targets).any()) else torch.ones(64)
                for n in shown:
                    x = point_sample(output["pred_masks"][b, matched[0][n], t][None, None], fixed)[0, 0].double()
                    bce = bce + (valid * F.softplus(x) - sampled[n] * x).sum() / valid.sum()
                    p = x.sigmoid()
                    area = (p * valid).sum() + sampled[n].sum() + 1
                    dice = dice + 1 - (2 * (p * sampled[n]).sum() + 1) / area
        expected = {"loss_ce": 2 * ce / weight, "loss_mask": 5 * bce / count, "loss_dice": 5 * dice / count}
        for name, value in expected.items():
            assert_close(found[name + suffix], value, "sum")
    assert len(found) == 3 * (5 if rounds == 2 else 3)
    sum(found.values()).backward()
    # Masks of frames without the target, and of frames without labels, are free.
    assert not outputs["pred_masks"].grad[1, :, 1].any()


def test_first_frame_matching_serves_clip_and_frame_branch(monkeypatch):
    """THE-Mask: classes of the clip branch, masks of the frame branch, targets in the order of their first frames."""
    outputs, targets = make_outputs(frames=FRAMES, frame_branch=True), make_targets()
    criterion = make_criterion(matching="first-frame", rounds=2)
    losses = criterion(outputs, targets, SEEDS)
    assert all(torch.isfinite(value) for value in losses.values())
    outputs["pred_masks"].requires_grad_(False)
    matches = criterion._match(
        {"": [*outputs["aux_outputs"], outputs], "frame_": [*outputs["frame"]["aux_outputs"], outputs["frame"]]},
        targets,
        SEEDS,
        1,
    )
    points = torch.rand(3, 64, 2, generator=point_generator(SEEDS[0], 0))[2]
    combined = {
        "pred_logits": outputs["pred_logits"][:, None].expand(-1, FRAMES, -1, -1),
        "pred_masks": outputs["frame"]["pred_masks"],
    }
    query, target = matches[2][0][0]
    (expected,) = match(combined, 0, targets[0], points, 1)
    assert dict(zip(target.tolist(), query.tolist(), strict=True)) == expected


def test_clips_of_one_frame_are_images():
    """One frame with classes per frame is what an image with classes per clip is."""
    outputs = make_outputs()
    targets = [clip_targets([label_map([0, 1, 255, 1])], 255, K), clip_targets([label_map([2, 3, 3, 4])], 255, K)]
    per_frame = {
        "pred_logits": outputs["pred_logits"][:, None],
        "pred_masks": outputs["pred_masks"],
        "aux_outputs": [{**aux, "pred_logits": aux["pred_logits"][:, None]} for aux in outputs["aux_outputs"]],
    }
    plain = make_criterion(rounds=2)(outputs, targets, SEEDS)
    for matching in ("clip", "first-frame"):
        found = make_criterion(rounds=2, matching=matching)(per_frame, targets, SEEDS)
        for name, value in plain.items():
            torch.testing.assert_close(found[name], value)


def test_unknown_matching():
    with pytest.raises(ValueError, match=r"MODEL\.MASK_FORMER\.MATCHING"):
        make_criterion(matching="video")
