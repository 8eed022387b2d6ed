"""Propagators: compute the scores of a frame from those of the previous frame and both frames at small size.

Axes: B streams, C score channels (K classes, or Q masks), h w cells of the working grid.

A propagator is pure and batched: all that a stream keeps is in its :class:`Propagated`, nothing in the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from the_mask.config.keys.keyframe import VARIANTS
from the_mask.modeling.propagation.filtering import (
    delay_kernels,
    displacements,
    dynamic_filter,
    edge_map,
    filter_weights,
)
from the_mask.modeling.propagation.geometry import warp
from the_mask.modeling.propagation.networks import WIDTH, GuideNet, IntraNet, LightFlowNet


@dataclass
class Propagated:
    """The result of one step.

    Attributes:
        scores: [B, C, h, w] of this frame.
        warp_error: [B] mean absolute difference of the warped previous frame and this one, in standard deviations.
        flow: [B, 2, h, w] cells, from this frame to the previous one; None without a flow network.
        intra: [B, K, h, w] class logits of this frame alone; None without an intra network.
        intra_weight: [B] mean filter weight of the intra slot; None without an intra network.
        queries: [B, Q, h, w] propagated mask logits; None without queries.
    """

    scores: Tensor
    warp_error: Tensor
    flow: Tensor | None = None
    intra: Tensor | None = None
    intra_weight: Tensor | None = None
    queries: Tensor | None = None

    def row(self, row: int) -> Propagated:
        """One stream's part, as a batch of one."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[row : row + 1]

        return Propagated(
            scores=self.scores[row : row + 1],
            warp_error=self.warp_error[row : row + 1],
            flow=cut(self.flow),
            intra=cut(self.intra),
            intra_weight=cut(self.intra_weight),
            queries=cut(self.queries),
        )


class Propagator(nn.Module):
    """Base: ``forward(scores, queries, frame, previous) -> Propagated``.

    Attributes:
        carries_queries: whether mask logits can be propagated in addition to class scores.
        has_flow, has_intra: whether ``flow`` and ``intra`` of the result are filled.
    """

    carries_queries = True
    has_flow = False
    has_intra = False

    def forward(self, scores: Tensor, frame: Tensor, previous: Tensor, queries: Tensor | None = None) -> Propagated:
        """Propagate by one frame.

        Args:
            scores: [B, K, h, w] of the previous frame.
            frame, previous: normalised small frames [B, 3, h, w].
            queries: [B, Q, h, w] mask logits of the previous frame, or None.

        Raises:
            ValueError: queries for a propagator that cannot carry them.
        """
        raise NotImplementedError


class CopyPropagator(Propagator):
    """The key frame's scores for all frames that follow: the baseline to beat."""

    def forward(self, scores: Tensor, frame: Tensor, previous: Tensor, queries: Tensor | None = None) -> Propagated:
        return Propagated(scores, _difference(previous, frame), queries=queries)


class WarpPropagator(Propagator):
    """Scores moved along the light network's optical flow."""

    has_flow = True

    def __init__(self, norm: str = "BN") -> None:
        super().__init__()
        self.flow = LightFlowNet(norm)

    def forward(self, scores: Tensor, frame: Tensor, previous: Tensor, queries: Tensor | None = None) -> Propagated:
        flow = self.flow(frame, previous)
        moved, error, moved_queries = _move(flow, scores, frame, previous, queries)
        return Propagated(moved, error, flow, queries=moved_queries)


class IdealDelay(nn.Module):
    """The displacements of the filter, with the impulse kernels that released checkpoints hold (81 fixed values)."""

    filter_copy_s: Tensor

    def __init__(self, reach: int, stored: bool) -> None:
        super().__init__()
        self.shifts = displacements(reach)
        # One kernel more than there are shifts: the slot of zeros.
        self.zeros = 1 if stored else 0
        self.stored = stored
        if stored:
            self.register_buffer("filter_copy_s", delay_kernels(self.shifts, extra=self.zeros))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        name = f"{prefix}filter_copy_s"
        theirs = state_dict.get(name)
        expected = delay_kernels(self.shifts, extra=self.zeros)
        if self.stored and theirs is not None and not torch.equal(theirs.float().cpu(), expected):
            raise ValueError(
                f"{name} holds other displacement kernels than MODEL.KEYFRAME.REACH gives; only the released layout "
                f"(8 neighbours and a kernel of zeros, shape {list(expected.shape)}) is supported"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


class GuidedFilter(nn.Module):
    """Intra network, guide and filter: everything in GSVNet after the warp ("grm" in released checkpoints)."""

    def __init__(self, num_classes: int, variant: str, intra: bool = True, reach: int = 1, norm: str = "BN") -> None:
        """
        Args:
            num_classes: K.
            variant: "paper": 8 shifts, sigmoid edges, softmax weights; "official": the released code, with a slot of
                zeros, binary edges and weights relu(r) / sum, compatible with its checkpoints; "agnostic": the guide
                sees the 32 intra features instead of the class logits, so that one filter serves any channels.
            intra: False leaves the intra network and its slot out (Table 4 of the paper).
            reach: see :func:`displacements`.
            norm: of all networks.
        """
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"MODEL.KEYFRAME.VARIANT {variant!r}: expected one of {', '.join(VARIANTS)}")
        if variant == "official" and (not intra or reach != 1):
            raise ValueError("MODEL.KEYFRAME.VARIANT official has intra features and REACH 1; choose paper or agnostic")
        self.variant = variant
        self.edges = {"paper": "sigmoid", "official": "laplacian", "agnostic": "differs"}[variant]
        self.normalisation = "relu" if variant == "official" else "softmax"
        self.ideal_dk = IdealDelay(reach, stored=variant == "official")
        self.intra_net = IntraNet(num_classes, norm) if intra else None
        known = 0 if not intra else WIDTH if variant == "agnostic" else num_classes
        slots = 1 + len(self.ideal_dk.shifts) + self.ideal_dk.zeros + intra
        self.guide = GuideNet(known + 1, slots, norm)

    def forward(
        self, warped: Tensor, frame: Tensor, queries: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Filter warped scores [B, K, h, w], and warped mask logits [B, Q, h, w] if any, for a small frame.

        Returns:
            scores, intra logits, mean weight [B] of the intra slot, mask logits.
        """
        edges = edge_map(warped.detach().argmax(dim=1), self.edges)
        features, intra = (None, None) if self.intra_net is None else self.intra_net(frame)
        known = features if self.variant == "agnostic" else intra
        raw = self.guide(edges if known is None else torch.cat([known, edges.to(known.dtype)], dim=1))
        weights = filter_weights(raw, self.normalisation)
        scores = dynamic_filter(warped, weights, self.ideal_dk.shifts, intra, self.ideal_dk.zeros)
        if queries is not None:
            # Masks have no intra prediction: the other slots share its weight.
            own = raw if intra is None else raw[:, :-1]
            queries = dynamic_filter(
                queries, filter_weights(own, self.normalisation), self.ideal_dk.shifts, None, self.ideal_dk.zeros
            )
        return scores, intra, None if intra is None else weights[:, -1].mean(dim=(-2, -1)), queries


class GSVNet(Propagator):
    """Warp along a light flow, then a guided, spatially varying filter over shifted copies and an intra prediction.

    Parameter names: ``flow`` (``state_dict_of`` of a released checkpoint) and ``grm`` (its ``state_dict``).
    """

    has_flow = True

    def __init__(
        self, num_classes: int, variant: str = "paper", intra: bool = True, reach: int = 1, norm: str = "BN"
    ) -> None:
        """See :class:`GuidedFilter`."""
        super().__init__()
        self.flow = LightFlowNet(norm)
        self.grm = GuidedFilter(num_classes, variant, intra, reach, norm)
        self.carries_queries = variant == "agnostic"
        self.has_intra = intra

    def forward(self, scores: Tensor, frame: Tensor, previous: Tensor, queries: Tensor | None = None) -> Propagated:
        if queries is not None and not self.carries_queries:
            raise ValueError("mask logits are carried by MODEL.KEYFRAME.VARIANT agnostic, or by copy and warp")
        flow = self.flow(frame, previous)
        moved, error, moved_queries = _move(flow, scores, frame, previous, queries)
        filtered, intra, intra_weight, filtered_queries = self.grm(moved, frame, moved_queries)
        return Propagated(filtered, error, flow, intra, intra_weight, filtered_queries)


def _move(
    flow: Tensor, scores: Tensor, frame: Tensor, previous: Tensor, queries: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Warp everything in one call: scores, error of the warped previous frame [B], mask logits."""
    parts = [scores, previous.to(scores.dtype)] + ([] if queries is None else [queries.to(scores.dtype)])
    moved = warp(torch.cat(parts, dim=1), flow).split([part.shape[1] for part in parts], dim=1)
    return moved[0], _difference(moved[1], frame), None if queries is None else moved[2]


def _difference(warped: Tensor, frame: Tensor) -> Tensor:
    return (warped.detach() - frame).abs().mean(dim=(1, 2, 3))
