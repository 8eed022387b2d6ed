"""Random outputs and targets for the tests of the criterion, and the whole loss written as loops in float64."""

import math
from dataclasses import fields

import torch
import torch.nn.functional as F

from the_mask.config.keys.mask_former import HierarchyOptions, LossOptions
from the_mask.modeling.mask.criterion import MaskCriterion
from the_mask.modeling.mask.matching import assign
from the_mask.modeling.mask.points import point_generator, point_sample
from the_mask.modeling.mask.targets import clip_targets

K, Q = 6, 12


def smooth(generator, *shape, scale=6.0):
    """Mask-like logits: coarse noise, enlarged."""
    coarse = torch.randn(math.prod(shape[:-2]), 1, 3, 4, generator=generator) * scale
    return F.interpolate(coarse, size=shape[-2:], mode="bilinear").view(shape)


def make_outputs(seed=0, clips=2, frames=1, sets=3, frame_branch=False, size=(8, 10), queries=Q):
    generator = torch.Generator().manual_seed(seed)

    def branch(logit_shape):
        made = [
            {
                "pred_logits": torch.randn(*logit_shape, generator=generator).requires_grad_(),
                "pred_masks": smooth(generator, clips, queries, frames, *size).requires_grad_(),
            }
            for _ in range(sets)
        ]
        return {**made[-1], "aux_outputs": made[:-1]}

    outputs = branch((clips, queries, K + 1))
    if frame_branch:
        outputs["frame"] = branch((clips, frames, queries, K + 1))
    return outputs


def make_label(seed, size=(32, 40), void=0.0, classes=K):
    generator = torch.Generator().manual_seed(1000 + seed)
    label = torch.randint(classes, (4, 5), generator=generator)
    label[torch.rand(4, 5, generator=generator) < void] = 255
    return label.repeat_interleave(size[0] // 4, 0).repeat_interleave(size[1] // 5, 1)


def make_targets(clips=2, frames=1, void=0.0, **kwargs):
    return [
        clip_targets([make_label(10 * b + t, void=void, **kwargs) for t in range(frames)], 255, K, name=f"clip{b}")
        for b in range(clips)
    ]


def make_criterion(**values):
    """A criterion with options of either class."""
    late = {field.name: values.pop(field.name) for field in fields(HierarchyOptions) if field.name in values}
    options = LossOptions(**{"train_num_points": 64, **values})
    return MaskCriterion(num_classes=K, options=options, hierarchy=HierarchyOptions(**late))


def leaves(outputs):
    found = []
    for branch in [outputs] + ([outputs["frame"]] if "frame" in outputs else []):
        for s in [*branch["aux_outputs"], branch]:
            found += [s["pred_logits"], s["pred_masks"]]
    return found


def scalars(values):
    return {k: v.item() for k, v in values.items()}


def naive_loss(outputs, targets, seeds, options, points):
    """The whole hierarchical loss by loops over maps, in float64, on dense masks; and the matching costs."""
    num_sets, num_queries = len(outputs["aux_outputs"]) + 1, outputs["pred_logits"].shape[1]
    branches = {"": outputs} | ({"frame_": outputs["frame"]} if "frame" in outputs else {})
    at = lambda branch, s: branch if s == num_sets - 1 else branch["aux_outputs"][s]  # noqa: E731
    valid_mask = options.get("valid_mask", True)
    rounds = options.get("rounds", 1)

    def supervised(b):
        valid = targets[b].valid()
        frames = range(len(valid))
        return [t for t in frames if targets[b].labelled[t] and (bool(valid[t].any()) or not valid_mask)]

    def sample(maps, where):
        return point_sample(maps[:, None].double(), where.double().expand(len(maps), -1, -1))[:, 0]

    def weight(b, t, where):
        if not valid_mask:
            return torch.ones(where.shape[-2], dtype=torch.float64)
        ignored = ~targets[b].valid()[t]
        return 1 - point_sample(ignored[None, None].double(), where.double(), "border")[0, 0]

    def bce(x, t, v):
        return (t * F.softplus(-x) + (v - t) * F.softplus(x)).sum() / v.sum().clamp(min=1e-9)

    def dice(x, t, v):
        return 1 - (2 * (x.sigmoid() * t).sum() + 1) / ((x.sigmoid() * v).sum() + t.sum() + 1)

    result = {}
    num_maps = max(1, sum(t.num_targets * len(supervised(b)) for b, t in enumerate(targets)))
    pairs, costs = {}, []
    for s in range(num_sets):
        mask_source = at(branches.get("frame_", outputs), s)
        for b, target in enumerate(targets):
            frames = supervised(b)
            draws = torch.rand(num_sets, len(points[0]), 2, generator=point_generator(seeds[b], 0))[s][None]
            v = torch.cat([weight(b, t, draws) for t in frames]) if frames else torch.zeros(0)
            cost = torch.zeros(num_queries, target.num_targets, dtype=torch.float64)
            only_bce = cost.clone()
            for q in range(num_queries):
                for n in range(target.num_targets):
                    x = torch.cat([sample(mask_source["pred_masks"][b, q, t][None], draws)[0] for t in frames])
                    y = torch.cat([sample(target.masks()[n, t][None], draws)[0] for t in frames])
                    probability = at(outputs, s)["pred_logits"][b, q].double().softmax(-1)[target.labels[n]]
                    only_bce[q, n] = bce(x, y, v)
                    cost[q, n] = -2 * probability + 5 * only_bce[q, n] + 5 * dice(x, y, v)
            if target.num_targets:
                costs.append(cost)
            later = only_bce if options.get("second_round_cost") == "bce" else None
            pairs[s, b] = assign(cost, rounds, later) if target.num_targets else [([], [])] * rounds

    for prefix, branch in branches.items():
        for s in range(num_sets):
            suffix = "" if s == num_sets - 1 else f"_{s}"
            terms = dict.fromkeys(["loss_ce", "loss_mask", "loss_dice"], torch.zeros((), dtype=torch.float64))
            if rounds > 1:
                terms |= dict.fromkeys(["loss_mask_secondary", "loss_dice_secondary"], terms["loss_ce"])
            nll, weights = 0.0, 0.0
            for b, target in enumerate(targets):
                classes = torch.full((num_queries,), K)
                factors = {}
                for r, (queries, indices) in enumerate(pairs[s, b]):
                    for q, n in zip(queries, indices, strict=True):
                        classes[q] = target.labels[n]
                        factors[int(q)] = options.get("secondary_class_weight", 1.0) if r else 1.0
                logits = at(branch, s)["pred_logits"][b].double()
                for t in supervised(b) if prefix else range(min(1, len(supervised(b)))):
                    log_p = (logits[t] if prefix else logits).log_softmax(-1)
                    for q in range(num_queries):
                        w = 0.1 if classes[q] == K else factors[q]
                        nll, weights = nll - w * log_p[q, classes[q]], weights + w
                for r, (queries, indices) in enumerate(pairs[s, b]):
                    for q, n in zip(queries, indices, strict=True):
                        for t in supervised(b):
                            x = at(branch, s)["pred_masks"][b, q, t].double()
                            truth = target.masks()[n, t]
                            if r == 0:
                                y, v = sample(truth[None], points)[0], weight(b, t, points)
                                x = sample(x[None], points)[0]
                            else:
                                x = F.interpolate(x[None, None], size=truth.shape, mode="nearest")[0, 0]
                                y = ((truth.double() * x.detach().sigmoid()) > 0.5).double()
                                v = targets[b].valid()[t].double() if valid_mask else torch.ones_like(y)
                            key = "_secondary" if r else ""
                            factor = 0.5 * 0.5 if r else 5.0
                            terms["loss_mask" + key] = terms["loss_mask" + key] + factor * bce(x, y, v) / num_maps
                            terms["loss_dice" + key] = terms["loss_dice" + key] + factor * dice(x, y, v) / num_maps
            if weights:
                terms["loss_ce"] = 2 * nll / weights
            result |= {f"{prefix}{k}{suffix}": (0.25 if prefix else 1.0) * v for k, v in terms.items()}
    return result, costs
