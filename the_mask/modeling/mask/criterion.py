"""The training loss of mask classification: matching, primary and secondary losses, clip and frame branch.

Axes: S prediction sets (aux 0..8, then final), B clips, T frames, Q queries, K classes, N targets, M maps, P points,
h w mask size, H W label size. An image is a clip of one frame; there is no second code path.

Sources: Mask2Former (point-sampled losses, deep supervision) and THE-Mask's released code (two rounds, secondary loss,
frame branch).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from the_mask.config.keys.mask_former import HierarchyOptions, LossOptions
from the_mask.modeling.mask import losses
from the_mask.modeling.mask.matched_maps import MapGroup, gather_maps
from the_mask.modeling.mask.matching import Pairs, first_frames, match_all
from the_mask.modeling.mask.points import (
    grid_values,
    importance_points,
    point_generator,
    shared_index_sample,
    shared_point_blocks,
)
from the_mask.modeling.mask.targets import ClipTargets, cell_counts

logger = logging.getLogger(__name__)

# Streams of random points of a sample, see points.point_generator.
_MATCHING, _PRIMARY, _SECONDARY = 0, 1, 3
_FRAME_BRANCH = 1  # added to the stream of the clip branch

Outputs = Mapping[str, Any]


class MaskCriterion(nn.Module):
    """Losses of all prediction sets of a batch of clips.

    Per prediction set: ``class_weight * CE`` on all queries, those of later rounds with weight
    ``secondary_class_weight``; ``primary_weight * (mask_weight * BCE + dice_weight * Dice)`` on the first round's
    pairs; and ``secondary_weight * (secondary_mask_weight * BCE + secondary_dice_weight * Dice)`` on the later rounds'
    pairs, whose targets are the ground truth where the query already predicts foreground. The frame branch has the same
    losses times ``frame_weight``. Normalisers are means over ranks, so that ranks together compute the loss of one
    process with the whole batch (see `losses.mean_over_ranks`).

    A model whose queries are carried from frame to frame has classes per frame (``pred_logits`` [B, T, Q, K + 1]
    without a frame branch). There a query has its target's class and mask in the frames that show the target; in the
    others it is no-object, and its mask is free.

    Attributes:
        empty_weight: buffer [K + 1], class weights of the cross-entropy.
        last_stats: plain numbers about the last batch: ``mode`` ("primary" or "hierarchical"), ``rounds``,
            ``positive_round1`` and ``positive_all`` (share of queries with a target after round one and after all
            rounds, over clips that have labels), ``videos`` (the same per clip, with ``name``), ``unmatched_targets``
            (targets that found no free query, over all rounds) and ``nonfinite_costs`` (matrices).
        nonfinite_total: matrices with non-finite costs since the start.
    """

    empty_weight: Tensor

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        options: LossOptions = LossOptions(),
        hierarchy: HierarchyOptions = HierarchyOptions(),
    ):
        super().__init__()
        self.num_classes, self.options, self.hierarchy = num_classes, options, hierarchy
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = options.no_object_weight
        self.register_buffer("empty_weight", empty_weight)
        self.last_stats: dict[str, Any] = {}
        self.nonfinite_total = 0
        self._batch_nonfinite = 0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments from ``MODEL.MASK_FORMER``, ``MODEL.THE_MASK`` and ``MODEL.SEM_SEG_HEAD``."""
        return {
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "options": LossOptions.from_config(cfg),
            "hierarchy": HierarchyOptions.from_config(cfg),
        }

    def active_rounds(self, iteration: int) -> int:
        """Rounds of matching at a trainer iteration: 1 during warm-up.

        ``warmup_mode = "reference"`` is the released code, whose counter never moves, so any warm-up lasts for ever.
        """
        rule = self.hierarchy
        warming = rule.warmup_iters > 0 and (rule.warmup_mode == "reference" or iteration < rule.warmup_iters)
        return 1 if warming else rule.rounds

    def mode(self, iteration: int) -> str:
        """The name of the loss at a trainer iteration, for the log: "primary" (one round) or "hierarchical"."""
        return "primary" if self.active_rounds(iteration) == 1 else "hierarchical"

    def forward(
        self, outputs: Outputs, targets: Sequence[ClipTargets], seeds: Sequence[int] | None = None, iteration: int = 0
    ) -> dict[str, Tensor]:
        """Weighted losses of one batch.

        Args:
            outputs: ``pred_logits`` [B, Q, K + 1] or, per frame, [B, T, Q, K + 1], ``pred_masks`` [B, Q, T, h, w],
                ``aux_outputs`` (optional list of such dicts), and optionally ``frame``: the frame branch with
                ``pred_logits`` [B, T, Q, K + 1], ``pred_masks`` [B, Q, T, h, w] and ``aux_outputs``.
            targets: one per clip, with T frames, ``index_map`` on the outputs' device and at one size.
            seeds: seed of the random points, one per clip. None draws seeds from torch's global generator.
            iteration: of the trainer, for the warm-up.

        Returns:
            ``loss_ce``, ``loss_mask``, ``loss_dice`` and, with later rounds, ``loss_mask_secondary`` and
            ``loss_dice_secondary``, all with suffix ``_i`` for auxiliary set i and prefix ``frame_`` for the frame
            branch. Their sum is the training loss.

        Raises:
            ValueError: outputs and targets do not fit each other.
        """
        branches = {"": _prediction_sets(outputs)}
        if outputs.get("frame") is not None:
            branches["frame_"] = _prediction_sets(outputs["frame"])
        self._check(branches, targets)
        if seeds is None:
            seeds = torch.randint(2**31, (len(targets),)).tolist()
        rounds = self.active_rounds(iteration)
        result: dict[str, Tensor] = {}
        with torch.autocast(device_type=branches[""][0]["pred_logits"].device.type, enabled=False):
            matches = self._match(branches, targets, seeds, rounds)
            for prefix, sets in branches.items():
                weight = self.hierarchy.frame_weight if prefix else 1.0
                terms = self._classification(sets, matches, targets, bool(prefix))
                terms |= self._masks(sets, matches, targets, seeds, rounds, bool(prefix))
                for name, values in terms.items():
                    for s, value in enumerate(values.unbind(0)):
                        suffix = "" if s == len(sets) - 1 else f"_{s}"
                        result[f"{prefix}{name}{suffix}"] = weight * value
        self._record(matches, targets, branches[""][0]["pred_logits"].shape[-2], rounds, iteration)
        return result

    def _check(self, branches: Mapping[str, list[Outputs]], targets: Sequence[ClipTargets]) -> None:
        masks = branches[""][0]["pred_masks"]
        if masks.ndim != 5 or masks.shape[0] != len(targets):
            raise ValueError(
                f"pred_masks must be [B, Q, T, h, w] with B = {len(targets)} clips, got {tuple(masks.shape)}"
            )
        sizes = {tuple(t.index_map.shape) for t in targets}
        if len(sizes) > 1 or next(iter(sizes))[0] != masks.shape[2]:
            raise ValueError(f"targets must be [T={masks.shape[2]}, H, W] of one size, got {sorted(sizes)}")
        if "frame_" in branches and len(branches["frame_"]) != len(branches[""]):
            raise ValueError(
                f"clip and frame branch must have as many prediction sets, got {len(branches[''])} and "
                f"{len(branches['frame_'])}"
            )

    @torch.no_grad()
    def _match(
        self, branches: Mapping[str, list[Outputs]], targets: Sequence[ClipTargets], seeds: Sequence[int], rounds: int
    ) -> list[list[list[Pairs]]]:
        """Pairs [S][B][rounds]. Class costs from the clip branch, mask costs from the frame branch if there is one.

        One set of uniform points per clip and prediction set, shared by queries, targets and frames.
        """
        class_sets, mask_sets = branches[""], branches.get("frame_", branches[""])
        num_sets, device = len(class_sets), class_sets[0]["pred_logits"].device
        costs: dict[tuple[int, int], Tensor] = {}
        later: dict[tuple[int, int], Tensor] = {}
        orders: list[list[int]] = []
        for b, target in enumerate(targets):
            if target.num_targets == 0:
                orders.append([])
                continue
            frames = target.supervised_frames(self.options.valid_mask)
            firsts = first_frames(target.present, frames) if self.options.matching == "first-frame" else []
            orders.append(firsts)
            if firsts:
                frames = sorted(set(firsts))
            generator = point_generator(seeds[b], _MATCHING, device)
            points = torch.rand(num_sets, self.options.train_num_points, 2, generator=generator, device=device)
            # [T'][S, P, N + 1]; the last column is the ignored share of the point.
            sampled = [shared_index_sample(target.index_map[t], points, target.num_targets + 1) for t in frames]
            labels = target.labels.to(device)
            for s in range(num_sets):
                logits = class_sets[s]["pred_logits"][b]
                parts = []
                for t, values in zip(frames, sampled, strict=True):
                    truth = values[s]
                    # Outside the map, the border pixel is repeated; normalising the share has that effect.
                    skip_ignored = self.options.valid_mask and target.has_ignored[t]
                    valid = 1 - truth[:, -1] / truth.sum(1) if skip_ignored else None
                    parts.append(_mask_sums(mask_sets[s]["pred_masks"][b, :, t], truth[:, :-1], valid, points[s]))
                if firsts:
                    # Each target's column comes from its first frame.
                    picked = [[n for n, first in enumerate(firsts) if first == t] for t in frames]
                    columns = torch.tensor([n for group in picked for n in group], device=device).argsort()
                    bces = [losses.bce_cost(sums)[:, group] for sums, group in zip(parts, picked, strict=True)]
                    dices = [losses.dice_cost(sums)[:, group] for sums, group in zip(parts, picked, strict=True)]
                    bce, dice = torch.cat(bces, 1)[:, columns], torch.cat(dices, 1)[:, columns]
                    class_logits = logits if logits.ndim == 2 else logits[firsts]
                else:
                    sums = parts[0]
                    for part in parts[1:]:
                        sums = sums.plus(part)
                    bce, dice = losses.bce_cost(sums), losses.dice_cost(sums)
                    class_logits = logits if logits.ndim == 2 else logits[frames]
                costs[s, b] = (
                    self.options.class_weight * _class_cost(class_logits, labels, bool(firsts))
                    + self.options.mask_weight * bce
                    + self.options.dice_weight * dice
                )
                later[s, b] = bce
        keys = sorted(costs)
        self._batch_nonfinite = 0
        found = match_all(
            [costs[k] for k in keys],
            rounds,
            [later[k] for k in keys] if self.hierarchy.second_round_cost == "bce" else None,
            [f"{_set_name(s, num_sets)} of clip {targets[b].name or b}" for s, b in keys],
            self._report_nonfinite,
            [orders[b] for _, b in keys] if self.options.matching == "first-frame" else None,
        )
        by_key = dict(zip(keys, found, strict=True))
        empty = torch.zeros(0, dtype=torch.long)
        nothing: list[Pairs] = [(empty, empty)] * rounds
        return [[by_key.get((s, b), nothing) for b in range(len(targets))] for s in range(num_sets)]

    def _report_nonfinite(self, message: str) -> None:
        if self.nonfinite_total == 0:
            logger.warning(
                "%s; they are matched last. Usual causes: too high a learning rate, fp16 overflow, broken input. "
                "Further ones are only counted (nonfinite_costs).",
                message,
            )
        self._batch_nonfinite += 1
        self.nonfinite_total += 1

    def _classification(
        self, sets: list[Outputs], matches: list[list[list[Pairs]]], targets: Sequence[ClipTargets], frame_branch: bool
    ) -> dict[str, Tensor]:
        """``loss_ce`` [S]. All rounds' queries are positive (``secondary_class_weight``), all others are no-object.

        In the frame branch a class absent from a frame is still the label of its queries there (released code). Frames
        without labels, and clips without labelled frames, weigh nothing.
        """
        logits = torch.stack([s["pred_logits"] for s in sets])  # [S, B, (T,) Q, K + 1]
        num_sets, num_clips, num_queries = logits.shape[0], logits.shape[1], logits.shape[-2]
        per_frame = logits.ndim == 5
        num_frames = logits.shape[2] if per_frame else 1
        classes = torch.full((num_sets, num_clips, num_frames, num_queries), self.num_classes)
        factors = torch.ones(num_sets, num_clips, 1, num_queries)
        counted = torch.zeros(num_clips, num_frames)
        for b, target in enumerate(targets):
            frames = target.supervised_frames(self.options.valid_mask)
            counted[b, frames if per_frame else slice(0, len(frames) > 0)] = 1.0
            shown = torch.tensor(target.present, dtype=torch.bool).reshape(len(target.present), target.num_targets)
            for s in range(num_sets):
                for number, (query, index) in enumerate(matches[s][b]):
                    factors[s, b, :, query] = self.hierarchy.secondary_class_weight if number else 1.0
                    label = target.labels[index].expand(num_frames, -1)
                    absent = torch.full_like(label, self.num_classes)
                    by_presence = per_frame and not frame_branch
                    classes[s, b, :, query] = torch.where(shown[:, index], label, absent) if by_presence else label
        classes = classes.to(logits.device)
        counts = (counted.unsqueeze(-1) * factors).to(logits.device)
        weights = self.empty_weight[classes] * counts  # [S, B, T', Q]
        rows = classes.reshape(num_sets, -1)
        weights = weights.reshape(num_sets, -1)
        # The released code divides by each GPU's own sum of weights, which makes the loss depend on how clips are
        # spread over GPUs. Here the sum is over all ranks.
        normaliser = losses.mean_over_ranks(weights.sum(1))
        value = losses.classification_loss(logits.reshape(num_sets, -1, logits.shape[-1]), rows, weights, normaliser)
        return {"loss_ce": self.options.class_weight * value}

    def _masks(
        self,
        sets: list[Outputs],
        matches: list[list[list[Pairs]]],
        targets: Sequence[ClipTargets],
        seeds: Sequence[int],
        rounds: int,
        frame_branch: bool,
    ) -> dict[str, Tensor]:
        """``loss_mask``, ``loss_dice`` and, with later rounds, the secondary ones, each [S]."""
        supervised = [t.supervised_frames(self.options.valid_mask) for t in targets]
        by_presence = sets[0]["pred_logits"].ndim == 4 and not frame_branch
        groups, maps = gather_maps(sets, matches, supervised, [t.present for t in targets] if by_presence else None)
        device = maps.device
        # Spec: num_masks * T with T labelled frames per clip; the same number serves the frame branch.
        count = sum(
            sum(sum(t.present[frame]) if by_presence else t.num_targets for frame in frames)
            for t, frames in zip(targets, supervised, strict=True)
        )
        num_maps = losses.mean_over_ranks(torch.tensor(float(count), device=device)).clamp(min=1.0)
        generators: dict[tuple[int, int], torch.Generator] = {}
        totals = {name: maps[:0].sum() + torch.zeros(len(sets), device=device) for name in _mask_terms(rounds)}
        for group, logits in zip(groups, maps.split([len(g.sets) for g in groups]), strict=True):
            stream = (_SECONDARY if group.later else _PRIMARY) + (_FRAME_BRANCH if frame_branch else 0)
            key = (group.clip, stream)
            if key not in generators:
                generators[key] = point_generator(seeds[group.clip], stream, device)
            compute = self._secondary if group.later else self._primary
            bce, dice = compute(logits, group, targets[group.clip], generators[key])
            owner = torch.tensor(group.sets).to(device)
            suffix = "_secondary" if group.later else ""
            totals["loss_mask" + suffix] = totals["loss_mask" + suffix].index_add(0, owner, bce)
            totals["loss_dice" + suffix] = totals["loss_dice" + suffix].index_add(0, owner, dice)
        weights = {
            "loss_mask": self.hierarchy.primary_weight * self.options.mask_weight,
            "loss_dice": self.hierarchy.primary_weight * self.options.dice_weight,
            "loss_mask_secondary": self.hierarchy.secondary_weight * self.hierarchy.secondary_mask_weight,
            "loss_dice_secondary": self.hierarchy.secondary_weight * self.hierarchy.secondary_dice_weight,
        }
        return {name: weights[name] * total / num_maps for name, total in totals.items()}

    def _primary(
        self, logits: Tensor, group: MapGroup, target: ClipTargets, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """BCE and dice [M] of maps [M, h, w] at importance-sampled points."""
        skip_ignored = self.options.valid_mask and target.has_ignored[group.frame]
        ignored = target.mask(target.num_targets, group.frame) if skip_ignored else None
        points = importance_points(
            logits.detach(),
            self.options.train_num_points,
            self.options.oversample_ratio,
            self.options.importance_sample_ratio,
            generator,
            ignored,
        )
        grid = 2.0 * points - 1.0
        values = grid_values(logits[:, None], grid)[:, 0]
        truth = torch.empty_like(values, requires_grad=False)
        start = 0
        while start < len(group.targets):
            index = group.targets[start]
            stop = start + group.targets[start:].count(index)
            truth[start:stop] = _sample_bits(target.mask(index, group.frame), grid[start:stop])
            start = stop
        valid = None if ignored is None else 1 - _sample_bits(ignored, grid, "border")
        return losses.mask_bce_loss(values, truth, valid), losses.mask_dice_loss(values, truth, valid)

    def _secondary(
        self, logits: Tensor, group: MapGroup, target: ClipTargets, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """BCE and dice [M] of maps [M, h, w] enlarged to H x W by nearest neighbour, on pseudo-targets."""
        points = None
        if self.hierarchy.secondary_num_points > 0:
            points = torch.rand(self.hierarchy.secondary_num_points, 2, generator=generator, device=logits.device)
        num_targets = target.num_targets
        counts = cell_counts(target.index_map[group.frame], num_targets + 1, logits.shape[-2:], points)
        area = (counts[:num_targets] if self.options.valid_mask else counts).sum(0).expand(len(logits), -1)
        values = logits.flatten(1)
        truth = losses.pseudo_targets(values, counts[group.targets])
        return losses.mask_bce_loss(values, truth, area), losses.mask_dice_loss(values, truth, area)

    def _record(
        self,
        matches: list[list[list[Pairs]]],
        targets: Sequence[ClipTargets],
        num_queries: int,
        rounds: int,
        iteration: int,
    ) -> None:
        """Fill `last_stats` from the final prediction set."""
        videos: list[dict[str, Any]] = []
        unmatched = 0
        for b, target in enumerate(targets):
            if not target.supervised_frames(self.options.valid_mask):
                continue
            found = [len(pair[0]) for pair in matches[-1][b]]
            unmatched += target.num_targets * rounds - sum(found)
            videos.append(
                {
                    "name": target.name,
                    "positive_round1": found[0] / num_queries,
                    "positive_all": sum(found) / num_queries,
                }
            )
        count = max(len(videos), 1)
        self.last_stats = {
            "mode": self.mode(iteration),
            "rounds": rounds,
            "positive_round1": sum(v["positive_round1"] for v in videos) / count,
            "positive_all": sum(v["positive_all"] for v in videos) / count,
            "videos": videos,
            "unmatched_targets": unmatched,
            "nonfinite_costs": self._batch_nonfinite,
        }


def _prediction_sets(outputs: Outputs) -> list[Outputs]:
    """Auxiliary sets first, the final one last."""
    return [*(outputs.get("aux_outputs") or []), outputs]


def _mask_sums(maps: Tensor, truth: Tensor, valid: Tensor | None, points: Tensor) -> losses.MaskSums:
    """Sums of masks [Q, h, w] with targets [P, N] at points [P, 2] of one frame; ``valid``: [P]."""
    sums: losses.MaskSums | None = None
    for rows, logits in shared_point_blocks(maps, points):
        part = losses.pairwise_mask_sums(logits.t(), truth[rows].t(), None if valid is None else valid[rows])
        sums = part if sums is None else sums.plus(part)
    assert sums is not None
    return sums


def _class_cost(logits: Tensor, labels: Tensor, of_targets: bool) -> Tensor:
    """Class cost [Q, N].

    Args:
        logits: [Q, K + 1]; or one per target [N, Q, K + 1] with ``of_targets``; or one per frame, which are averaged.
    """
    if logits.ndim == 2:
        return losses.class_cost(logits, labels)
    if of_targets:
        return torch.cat([losses.class_cost(own, labels[n : n + 1]) for n, own in enumerate(logits)], dim=1)
    return torch.stack([losses.class_cost(frame, labels) for frame in logits]).mean(0)


def _set_name(index: int, num_sets: int) -> str:
    return "final prediction" if index == num_sets - 1 else f"auxiliary prediction {index}"


def _mask_terms(rounds: int) -> list[str]:
    return ["loss_mask", "loss_dice"] + (["loss_mask_secondary", "loss_dice_secondary"] if rounds > 1 else [])


def _sample_bits(mask: Tensor, grid: Tensor, padding: str = "zeros") -> Tensor:
    """Bilinear values [M, P] of one bool mask [H, W] at [M, P, 2] in -1..1; only this mask is ever made float."""
    return grid_values(mask[None, None].float(), grid.reshape(1, -1, 2), padding).view(grid.shape[:2])
