"""Context from the class memory: each pixel looks up the rows of its class, then attends to the rows of all pixels.

"Memory Based Video Scene Parsing", Eq. 5-6 (after MCIBI). Axes: B frames, K classes, n prototypes, C channels, h w
feature size, N = h*w.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from the_mask.config.keys.memory import LOOKUPS
from the_mask.modeling.pixel.context.class_memory import ClassMemory
from the_mask.modeling.pixel.context.prior_map import PriorMap
from the_mask.modeling.pixel.context.types import TrainBatch
from the_mask.modeling.pixel.layers import ConvNorm, classifier


class ClassAttention(nn.Module):
    """Attention from pixels to the rows looked up: softmax(g_q(R) g_k(L)^T / sqrt(C/2)) g_v(L), C channels (Eq. 5-6).

    g_q and g_k are two 1x1 convolutions each, g_v and g_o one, all with norm and ReLU (released code).
    """

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        inner = channels // 2
        self.query = nn.Sequential(ConvNorm(channels, inner, 1, norm), ConvNorm(inner, inner, 1, norm))
        self.key = nn.Sequential(ConvNorm(channels, inner, 1, norm), ConvNorm(inner, inner, 1, norm))
        self.value = ConvNorm(channels, inner, 1, norm)
        self.out = ConvNorm(inner, channels, 1, norm)

    def forward(self, features: Tensor, looked_up: Tensor, known: Tensor) -> Tensor:
        """
        Args:
            features: R [B, C, h, w].
            looked_up: L [B, C, h, w].
            known: bool [B, h, w]; the other pixels of L are no keys, and without any key a frame attends to nothing.

        Returns:
            [B, C, h, w].
        """
        query, key, value = (
            part(x).flatten(2).transpose(1, 2)[:, None]
            for part, x in ((self.query, features), (self.key, looked_up), (self.value, looked_up))
        )
        mask = known.flatten(1)[:, None, None]
        some = mask.any(dim=-1, keepdim=True)
        # Softmax over no key is undefined; such a frame attends to all pixels, and the result is set to zero.
        attended = F.scaled_dot_product_attention(query, key, value, mask | ~some, scale=query.shape[-1] ** -0.5)
        attended = (attended * some)[:, 0].transpose(1, 2).unflatten(2, features.shape[-2:])
        return self.out(attended)


@dataclass(frozen=True)
class ClassContextOutput:
    """What :class:`ClassContext` returns.

    Attributes:
        feature: C_bi [B, C, h, w].
        stage1: class logits [B, K, h, w] of the first classifier.
    """

    feature: Tensor
    stage1: Tensor


class ClassContext(nn.Module):
    """Class memory, first classifier and attention around features of one level.

    Args:
        channels: C.
        memory: of the same C.
        ignore_label: of labels.
        norm: as for Detectron2's ``get_norm``.
        dropout: before the first classifier.
        lookup: what is made of the first classifier's prior: "hard" (paper) its labels, "soft" its probabilities.
        total_iterations: length of the training, for the momentum.
    """

    def __init__(
        self,
        channels: int,
        memory: ClassMemory,
        ignore_label: int = 255,
        norm: str = "BN",
        dropout: float = 0.1,
        lookup: str = "hard",
        total_iterations: int = 1,
    ) -> None:
        super().__init__()
        num_classes, prototypes, memory_channels = memory.rows.shape
        if lookup not in LOOKUPS:
            raise ValueError(f"class memory: LOOKUP {lookup!r}: expected one of {', '.join(LOOKUPS)}")
        if channels % 2 or channels != memory_channels:
            raise ValueError(f"class memory: rows of {memory_channels} channels for features of {channels} (even)")
        self.memory = memory
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.lookup = lookup
        self.total_iterations = total_iterations
        self.stage1 = nn.Sequential(ConvNorm(channels, channels, 1, norm), nn.Dropout2d(dropout))
        self.conv_seg = classifier(channels, num_classes)
        self.attention = nn.ModuleList(ClassAttention(channels, norm) for _ in range(prototypes))
        self.fuse = ConvNorm(prototypes * channels, channels, 1, norm) if prototypes > 1 else nn.Identity()
        self._features: Tensor | None = None
        self._iteration = -1

    def forward(self, features: Tensor, prior: PriorMap | None = None) -> ClassContextOutput:
        """
        Args:
            features: R [B, C, h, w]; also what the memory is updated with.
            prior: of these frames, at any size. Where it is unknown, and without a prior, the first classifier
                decides.

        Raises:
            ValueError: a prior of another number of frames or classes.
        """
        logits = self.conv_seg(self.stage1(features))
        looked_up = self.look_up(logits, prior)
        known = (looked_up != 0).any(dim=2).any(dim=1)
        refined = [
            attention(features, rows.to(features.dtype), known)
            for attention, rows in zip(self.attention, looked_up.unbind(dim=1), strict=True)
        ]
        if self.training:
            # Kept only until after_loss, which has the labels.
            self._features = features.detach()
        return ClassContextOutput(self.fuse(torch.cat(refined, dim=1)), logits)

    def look_up(self, logits: Tensor, prior: PriorMap | None) -> Tensor:
        """Rows [B, n, C, h, w] that a prior, or the first classifier's logits [B, K, h, w], choose; detached."""
        own = PriorMap.from_logits(logits, self.ignore_label)
        if prior is None:
            return self.memory.read(own.harden() if self.lookup == "hard" else own)
        prior = prior.require(logits.shape[0], prior.size, self.num_classes)
        prior = prior.resize(logits.shape[-2], logits.shape[-1])
        return torch.where(prior.unknown()[:, None, None], self.memory.read(own), self.memory.read(prior))

    def memory_loss_of(self, classify: Callable[[Tensor], Tensor]) -> Tensor:
        """Cross-entropy of the memory's rows against their classes (MCIBI): keeps rows and classifier in step.

        Args:
            classify: features [R, C, 1, 1] -> logits [R, K, 1, 1], the decoder's last classifier.

        Returns:
            A scalar with a graph; 0 while no class was seen.
        """
        rows = self.memory.rows.detach().flatten(0, 1)
        classes, prototypes, _ = self.memory.rows.shape
        targets = torch.arange(classes, device=rows.device).repeat_interleave(prototypes)
        losses = F.cross_entropy(classify(rows[..., None, None])[..., 0, 0].float(), targets, reduction="none")
        seen = self.memory.seen.repeat_interleave(prototypes)
        return (losses * seen).sum() / seen.sum().clamp(min=1)

    @torch.no_grad()
    def after_loss(self, batch: TrainBatch, iteration: int) -> None:
        """Collect this batch's features by label; an iteration may have several batches."""
        if self._features is None:
            return
        if iteration != self._iteration:
            self.memory.reset()
            self._iteration = iteration
        self.memory.collect(self._features, batch.labels, [clip.seed for clip in batch.clips])
        self._features = None

    def after_step(self) -> None:
        """Update the memory with the features collected in all processes; a collective call."""
        self.memory.update(self.memory.momentum(self._iteration, self.total_iterations))
