"""One dense-attention block for ``tma``, ``apnb``, ``afnb`` and ``nonlocal``, which differ only in their parts.

projector (how queries, keys and values are made) -> sampler (which keys a query sees) -> softmax with a scale ->
fusion (how the context joins the input). Axes: B clips, T slots, C channels in, N = h w, S keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from the_mask.modeling.pixel.context.attention import attend, flatten_slots, pooled_frame, pooled_slots, slot_mask
from the_mask.modeling.pixel.context.registry import BlockInputs, ContextBlock, block_type
from the_mask.modeling.pixel.context.types import MAIN, BlockOutput, ClipFeatures, FrameFeatures, PriorMap
from the_mask.modeling.pixel.layers import ConvNorm

# Keys [B, C, S], values [B, V, S], and which keys are valid (bool [B, S], None: all).
Sampled = tuple[Tensor, Tensor, Tensor | None]
# (slots of keys [B, T, C, h, w], slots of values [B, T, V, h, w], valid [B, T]) -> Sampled
Sampler = Callable[[Tensor, Tensor, Tensor], Sampled]


def sample_all(keys: Tensor, values: Tensor, valid: Tensor) -> Sampled:
    """Every position of every slot."""
    return flatten_slots(keys), flatten_slots(values), slot_mask(valid, keys.shape[-2] * keys.shape[-1])


class PyramidSampler:
    """Average-pooled anchors over space and time; see :func:`pooled_slots`."""

    def __init__(self, sizes: Sequence[int], mode: str) -> None:
        self.sizes = tuple(sizes)
        self.mode = mode

    def __call__(self, keys: Tensor, values: Tensor, valid: Tensor) -> Sampled:
        pooled, mask = pooled_slots(keys, valid, self.sizes, self.mode)
        return pooled, pooled_slots(values, valid, self.sizes, self.mode)[0], mask


class SpatialPyramidSampler:
    """Average-pooled anchors of a single frame."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)

    def __call__(self, keys: Tensor, values: Tensor, valid: Tensor) -> Sampled:
        return pooled_frame(keys[:, 0], self.sizes), pooled_frame(values[:, 0], self.sizes), None


class Projector(nn.Module):
    """Makes the query [B, C, h, w], the own value (joined by the fusion), and slots of keys and values."""

    def query(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Main level -> (query, own value)."""
        raise NotImplementedError

    def slots(self, query: FrameFeatures, memory: ClipFeatures | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [B, T, C, h, w], values [B, T, V, h, w], valid [B, T]."""
        raise NotImplementedError


def pair(channels: int, width: int, norm: str) -> nn.Sequential:
    """TMANet's encoder: 1x1 then 3x3."""
    return nn.Sequential(ConvNorm(channels, width, 1, norm), ConvNorm(width, width, 3, norm))


class ClipProjector(Projector):
    """TMANet's encoders: one set for queries, and one for each memory slot (slot 0 = oldest).

    With ``include_current`` the current frame is the newest slot; with ``share_slots`` all slots use one set.
    """

    def __init__(
        self,
        channels: int,
        memory_channels: int,
        key_width: int,
        value_width: int,
        slots: int,
        norm: str,
        *,
        include_current: bool = False,
        share_slots: bool = False,
    ) -> None:
        super().__init__()
        if include_current and channels != memory_channels:
            raise ValueError(
                f"INCLUDE_CURRENT needs current and memory frames of one width, they have {channels} and "
                f"{memory_channels} channels"
            )
        sets = 1 if share_slots else slots + include_current
        self.length = slots
        self.include_current = include_current
        self.share_slots = share_slots
        self.query_key = pair(channels, key_width, norm)
        self.query_value = pair(channels, value_width, norm)
        self.memory_key = nn.ModuleList(pair(memory_channels, key_width, norm) for _ in range(sets))
        self.memory_value = nn.ModuleList(pair(memory_channels, value_width, norm) for _ in range(sets))

    def query(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_key(x), self.query_value(x)

    def slots(self, query: FrameFeatures, memory: ClipFeatures | None) -> tuple[Tensor, Tensor, Tensor]:
        if memory is None:
            raise ValueError("this block attends to past frames, but was given no memory")
        memory = memory.newest(self.length)
        frames, valid = memory.level(MAIN), memory.valid
        if self.include_current:
            frames = [*frames, query[MAIN]]
            valid = F.pad(valid, (0, 1), value=True)
        if self.share_slots:
            folded = torch.cat(frames)
            made = [encoder[0](folded) for encoder in (self.memory_key, self.memory_value)]
            keys, values = (x.unflatten(0, (len(frames), -1)).transpose(0, 1) for x in made)
        else:
            keys = torch.stack([encode(x) for encode, x in zip(self.memory_key, frames, strict=True)], dim=1)
            values = torch.stack([encode(x) for encode, x in zip(self.memory_value, frames, strict=True)], dim=1)
        return keys, values, valid


class FrameProjector(Projector):
    """Keys and values of one level of the current frame; ``key`` None shares the query's convolution."""

    def __init__(self, query: nn.Module, key: nn.Module | None, value: nn.Module, level: str = MAIN) -> None:
        super().__init__()
        self.to_query = query
        self.to_key = key
        self.to_value = value
        self.level = level

    def query(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_query(x), x

    def slots(self, query: FrameFeatures, memory: ClipFeatures | None) -> tuple[Tensor, Tensor, Tensor]:
        x = query[self.level]
        keys = (self.to_query if self.to_key is None else self.to_key)(x)
        return keys[:, None], self.to_value(x)[:, None], torch.ones(x.shape[0], 1, dtype=torch.bool, device=x.device)


class ConcatFusion(nn.Module):
    """Concatenate own value and context, then one convolution."""

    def __init__(self, channels: int, out_channels: int, kernel: int, norm: str) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.conv = ConvNorm(channels, out_channels, kernel, norm)

    def forward(self, own: Tensor, context: Tensor) -> Tensor:
        return self.conv(torch.cat([own, context], dim=1))


class ZeroStartFusion(nn.Module):
    """A 1x1 convolution of the context that starts at zero, concatenated with the input, 1x1 with norm, dropout."""

    def __init__(self, channels: int, width: int, norm: str, *, relu: bool, dropout: float) -> None:
        super().__init__()
        self.out_channels = channels
        self.expand = nn.Conv2d(width, channels, 1)
        nn.init.zeros_(self.expand.weight)
        assert self.expand.bias is not None
        nn.init.zeros_(self.expand.bias)
        self.conv = ConvNorm(2 * channels, channels, 1, norm, relu=relu)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, own: Tensor, context: Tensor) -> Tensor:
        return self.dropout(self.conv(torch.cat([own, self.expand(context)], dim=1)))


class ResidualFusion(nn.Module):
    """input + norm(1x1 context) with the norm's weight (or, without a norm, the convolution) starting at zero."""

    def __init__(self, channels: int, width: int, norm: str) -> None:
        super().__init__()
        self.out_channels = channels
        self.expand = ConvNorm(width, channels, 1, norm, relu=False)
        start: Any = self.expand.conv if isinstance(self.expand.bn, nn.Identity) else self.expand.bn
        nn.init.zeros_(start.weight)

    def forward(self, own: Tensor, context: Tensor) -> Tensor:
        return own + self.expand(context)


class DenseAttentionBlock(ContextBlock):
    """Projector, sampler, softmax and fusion; see the module's docstring."""

    def __init__(
        self,
        projector: Projector,
        sampler: Sampler,
        fusion: nn.Module,
        *,
        scale: float = 1.0,
        memory_len: int = 0,
        levels: Sequence[str] = (MAIN,),
    ) -> None:
        """
        Args:
            projector, sampler, fusion: the parts; ``fusion(own, context)`` has ``out_channels``.
            scale: of the logits.
            memory_len: T, for a projector of clips.
            levels: of the current frame that the projector reads.
        """
        super().__init__()
        self.projector: Projector = projector
        self.sampler = sampler
        self.fusion = fusion
        self.scale = scale
        self.in_levels = tuple(levels)
        self.memory_len = memory_len
        self.memory_levels = (MAIN,) if isinstance(projector, ClipProjector) else ()
        self.out_channels = fusion.out_channels  # type: ignore[assignment]

    def forward(
        self, query: FrameFeatures, memory: ClipFeatures | None = None, prior: PriorMap | None = None
    ) -> BlockOutput:
        q, own = self.projector.query(query[MAIN])
        keys, values, mask = self.sampler(*self.projector.slots(query, memory))
        context = attend(q.flatten(2), keys, values, mask, self.scale)
        return BlockOutput(self.fusion(own, context.unflatten(2, q.shape[-2:])))


class Surrounded(ContextBlock):
    """3x3 before, an inner block, 3x3 after, joined with the input by another 3x3 (heads of non-local and criss-cross).

    Memory frames pass through the first convolution as well.
    """

    def __init__(self, channels: int, inner: ContextBlock, width: int, norm: str) -> None:
        super().__init__()
        self.before = ConvNorm(channels, width, 3, norm)
        self.inner = inner
        self.after = ConvNorm(width, width, 3, norm)
        self.bottleneck = ConvNorm(channels + width, width, 3, norm)
        self.out_channels = width
        self.memory_len = inner.memory_len
        self.memory_levels = inner.memory_levels

    def forward(
        self, query: FrameFeatures, memory: ClipFeatures | None = None, prior: PriorMap | None = None
    ) -> BlockOutput:
        x = query[MAIN]
        if self.memory_levels:
            assert memory is not None
            memory = memory.newest(self.memory_len)
            made = self.before(torch.cat([*memory.level(MAIN), x])).chunk(len(memory) + 1)
            memory = ClipFeatures(tuple({MAIN: y} for y in made[:-1]), memory.valid)
            start = made[-1]
        else:
            start = self.before(x)
        inner = self.inner({**query, MAIN: start}, memory, prior).feature
        return BlockOutput(self.bottleneck(torch.cat([x, self.after(inner)], dim=1)))


def _clip_block(inputs: BlockInputs, sampler: Sampler) -> DenseAttentionBlock:
    options, slots = inputs.options, inputs.memory_length
    projector = ClipProjector(
        inputs.channels(),
        inputs.memory_channels(),
        options.KEY_CHANNELS,
        options.VALUE_CHANNELS,
        slots,
        inputs.norm,
        include_current=options.INCLUDE_CURRENT,
        share_slots=options.SHARE_SLOTS,
    )
    fusion = ConcatFusion(2 * options.VALUE_CHANNELS, options.CHANNELS, 3, inputs.norm)
    scale = options.KEY_CHANNELS**-0.5 if options.SCALE else 1.0
    return DenseAttentionBlock(projector, sampler, fusion, scale=scale, memory_len=slots)


@block_type("tma")
def build_tma(inputs: BlockInputs) -> ContextBlock:
    """TMANet's temporal memory attention: every pixel attends to all positions of all memory frames, unscaled."""
    return _clip_block(inputs, sample_all)


@block_type("apnb")
def build_apnb(inputs: BlockInputs) -> ContextBlock:
    """Asymmetric pyramid non-local block: ``cube``, ``clipped`` or ``plane`` anchors of the memory, or ``spatial``
    anchors of the current frame (the original)."""
    options = inputs.options
    mode = inputs.choice("POOL", ("cube", "clipped", "plane", "spatial"))
    if mode != "spatial":
        return _clip_block(inputs, PyramidSampler(options.SIZES, mode))
    width, channels = options.VALUE_CHANNELS, inputs.channels()
    projector = FrameProjector(ConvNorm(channels, width, 1, inputs.norm), None, nn.Conv2d(channels, width, 1))
    fusion = ZeroStartFusion(channels, width, inputs.norm, relu=True, dropout=options.DROPOUT)
    return DenseAttentionBlock(projector, SpatialPyramidSampler(options.SIZES), fusion, scale=width**-0.5)


@block_type("afnb")
def build_afnb(inputs: BlockInputs) -> ContextBlock:
    """Asymmetric fusion non-local block: the main level attends to pyramid anchors of an earlier level."""
    options = inputs.options
    width, channels, level = options.KEY_CHANNELS, inputs.channels(), options.LEVEL
    low = inputs.channels(level)
    projector = FrameProjector(
        ConvNorm(channels, width, 1, inputs.norm), ConvNorm(low, width, 1, inputs.norm), nn.Conv2d(low, width, 1), level
    )
    fusion = ZeroStartFusion(channels, width, inputs.norm, relu=False, dropout=options.DROPOUT)
    block = DenseAttentionBlock(
        projector, SpatialPyramidSampler(options.SIZES), fusion, scale=width**-0.5, levels=(MAIN, level)
    )
    block.apply_to_memory = options.APPLY_TO_MEMORY
    return block


@block_type("nonlocal")
def build_nonlocal(inputs: BlockInputs) -> ContextBlock:
    """Non-local head: embedded Gaussian attention over the current frame between 3x3 convolutions."""
    channels = inputs.options.CHANNELS
    width = channels // 2
    query, key, value = (nn.Conv2d(channels, width, 1) for _ in range(3))
    projector = FrameProjector(query, key, value)
    inner = DenseAttentionBlock(projector, sample_all, ResidualFusion(channels, width, inputs.norm), scale=width**-0.5)
    return Surrounded(inputs.channels(), inner, channels, inputs.norm)
