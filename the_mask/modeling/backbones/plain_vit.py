"""timm's plain vision transformers as token encoders: DINOv2, DINOv3 and ViTs, for images of any size.

State-dict keys are timm's own below ``model.``. Axes: N images, H W image size, h w patches per side, D width, P prefix
tokens (class token and registers, in front of the patches), S = P + h*w tokens, Q queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import timm
import timm.layers
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from the_mask.modeling.backbones.timm_adapter import check_model_name, convert_weights, load_exactly, read_weights
from the_mask.ops.fast_linear import fast_linear

# Earlier versions of timm initialise the layer scales of DINOv3 with wrong values.
LEAST_TIMM = (1, 0, 22)
# Detectron2's names of feature maps by stride.
LEVEL_NAMES = {8: "res3", 14: "res4", 16: "res4", 32: "res5"}


class Tokens(NamedTuple):
    """The tokens of some images.

    Attributes:
        values: [N, S, D].
        grid: (h, w).
        rotation: rotary positions of the patches for the blocks; None without.
    """

    values: Tensor
    grid: tuple[int, int]
    rotation: Tensor | None


def check_timm(version: str = timm.__version__) -> None:
    """Raise a ValueError unless timm is new enough."""
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers < LEAST_TIMM:
        least = ".".join(map(str, LEAST_TIMM))
        raise ValueError(
            f"timm {version} is too old: it starts the layer scales of DINOv3 wrongly; pip install 'timm>={least}'"
        )


class PlainViT(Backbone):
    """timm's ``VisionTransformer`` or ``Eva`` (DINOv3), split into embedding, blocks and norm.

    Args:
        name: timm's name, ``architecture[.tag]``.
        image_size: pixels per side of the square that the position table is for; other sizes resample it.
        patch_size: pixels per side of a patch; 0: the model's own. With another size, the kernel is resampled.
        pretrained: download timm's weights.
        weights: local file in any layout timm reads, wins over ``pretrained``; kernel and table are resampled.
        in_channels: channels of the images.
        drop_path: stochastic depth of the last block, rising linearly from 0.
        width, depth, heads: for smaller variants; 0: the model's own.
        recompute: keep no activations inside blocks, compute them again in the backward pass.
        levels: blocks whose outputs ``forward`` returns, as tokens with the prefix; empty: one map, of the last block.

    Raises:
        FileNotFoundError, ValueError: see :mod:`the_mask.modeling.backbones.timm_adapter`; timm is too old; not a
            plain ViT; an image smaller than a patch; a level that is no block.
    """

    def __init__(
        self,
        name: str = "vit_small_patch14_reg4_dinov2",
        image_size: int = 512,
        patch_size: int = 16,
        pretrained: bool = False,
        weights: str = "",
        in_channels: int = 3,
        drop_path: float = 0.0,
        width: int = 0,
        depth: int = 0,
        heads: int = 0,
        recompute: bool = False,
        levels: Sequence[int] = (),
    ) -> None:
        super().__init__()
        check_timm()
        self.model = _create(
            name,
            image_size,
            patch_size,
            pretrained=pretrained and not weights,
            in_chans=in_channels,
            drop_path_rate=drop_path,
            own={"embed_dim": width, "depth": depth, "num_heads": heads},
        )
        if weights:
            state = read_weights(weights)
            _check_table(state.get("pos_embed"), self.model, weights)
            state = convert_weights(self.model, state, weights)
            load_exactly(self.model, state, ["head.", "fc_norm.", "head_dist.", "attn_pool.", "mask_token"], weights)
        if any(not 0 <= level < self.depth for level in levels) or sorted(set(levels)) != list(levels):
            raise ValueError(
                f"MODEL.ENCODER.FROZEN.LEVELS {list(levels)}: expected rising block numbers in 0..{self.depth - 1}"
            )
        self.levels = tuple(levels)
        self.recompute = recompute
        self._last_positions: tuple[Any, Tensor | None, Tensor | None] | None = None

    @property
    def width(self) -> int:
        """Width D of the tokens."""
        return self.model.embed_dim

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.model.blocks)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of prefix tokens, P."""
        return self.model.num_prefix_tokens

    @property
    def patch_size(self) -> int:
        """Pixels per side of a patch."""
        return self.model.patch_embed.patch_size[0]

    @property
    def size_divisibility(self) -> int:
        return self.patch_size

    def output_shape(self) -> dict[str, ShapeSpec]:
        if self.levels:
            return {f"block{i}": ShapeSpec(channels=self.width, stride=self.patch_size) for i in self.levels}
        name = LEVEL_NAMES.get(self.patch_size, "res4")
        return {name: ShapeSpec(channels=self.width, stride=self.patch_size)}

    def train(self, mode: bool = True) -> Self:
        self._last_positions = None
        return super().train(mode)

    def make_room(self, num_queries: int, first: int) -> None:
        """Prepare blocks from ``first`` on for ``num_queries`` tokens in front, which get no rotary positions."""
        for block in self.model.blocks[first:]:
            if hasattr(block.attn, "num_prefix_tokens"):
                block.attn.num_prefix_tokens = self.num_prefix_tokens + num_queries

    def embed(self, images: Tensor) -> Tokens:
        """Embed images: patches with positions, prefix tokens in front.

        Args:
            images: [N, 3, H, W], normalised; H and W are multiples of the patch size.

        Raises:
            ValueError: other sizes.
        """
        height, width = images.shape[-2:]
        size = self.patch_size
        if height % size or width % size or height < size or width < size:
            raise ValueError(f"images of {height}x{width} pixels: both sides must be multiples of the patch, {size}")
        model, grid = self.model, (height // size, width // size)
        patches = model.patch_embed.norm(model.patch_embed.proj(images).flatten(2).transpose(1, 2))
        table, rotation = self._positions(grid)
        prefix = [
            token.expand(len(images), -1, -1) for token in (model.cls_token, model.reg_token) if token is not None
        ]
        if table is not None and model.no_embed_class:
            patches = patches + table
        values = torch.cat([*prefix, patches], dim=1)
        if table is not None and not model.no_embed_class:
            values = values + table
        return Tokens(model.norm_pre(model.pos_drop(values)), grid, rotation)

    def blocks(self, tokens: Tensor, rotation: Tensor | None, start: int, stop: int) -> Tensor:
        """Run blocks ``start`` ... ``stop - 1`` on [N, S, D]."""
        for number in range(start, stop):
            tokens = self.block(number, tokens, rotation)
        return tokens

    def block(self, number: int, tokens: Tensor, rotation: Tensor | None, allowed: Tensor | None = None) -> Tensor:
        """Run one block on [N, S, D]; ``allowed``: bool [N, 1, S, S], the attention mask."""
        return run_block(self.model.blocks[number], tokens, rotation, allowed, self.recompute and self.training)

    def norm(self, tokens: Tensor) -> Tensor:
        """The final norm."""
        return self.model.norm(tokens)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised tokens [N, S, D] of the levels, or normalised patches as one map [N, D, h, w]."""
        tokens = self.embed(images)
        if self.levels:
            features, values = {}, tokens.values
            for number in range(self.levels[-1] + 1):
                values = self.block(number, values, tokens.rotation)
                if number in self.levels:
                    features[f"block{number}"] = self.norm(values)
            return features
        values = self.norm(self.blocks(tokens.values, tokens.rotation, 0, self.depth))
        (name,) = self.output_shape()
        return {name: values[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, tokens.grid)}

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Position table [1, ., D] and rotary positions of a grid; in eval mode the last ones are cached."""
        model = self.model
        table = model.pos_embed
        keep = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        key: Any = None
        if keep:
            key = (grid, None if table is None else (table.data_ptr(), table._version, table.dtype, table.device))
            if self._last_positions is not None and self._last_positions[0] == key:
                return self._last_positions[1:]
        if table is not None and tuple(model.patch_embed.grid_size) != grid:
            table = timm.layers.resample_abs_pos_embed(
                table,
                new_size=list(grid),
                old_size=list(model.patch_embed.grid_size),
                num_prefix_tokens=0 if model.no_embed_class else model.num_prefix_tokens,
            )
        rope = getattr(model, "rope", None)
        rotation = None if rope is None else rope.get_embed(shape=list(grid))
        if keep:
            self._last_positions = (key, table, rotation)
        return table, rotation


def run_block(
    block: nn.Module, tokens: Tensor, rotation: Tensor | None, allowed: Tensor | None, recompute: bool = False
) -> Tensor:
    """A block of either kind on [N, S, D]; blocks without rotary positions take none."""
    arguments: dict[str, Any] = {"attn_mask": allowed}
    if rotation is not None:
        arguments["rope"] = rotation
    if recompute:
        return checkpoint(block, tokens, use_reentrant=False, **arguments)
    return block(tokens, **arguments)


class GeluMlp(timm.layers.Mlp):
    """timm's MLP with the GELU in the pass of the first layer where :func:`fast_linear` can."""

    def forward(self, x: Tensor) -> Tensor:
        x = fast_linear(x, self.fc1.weight, self.fc1.bias, gelu=True)
        return self.drop2(self.fc2(self.norm(self.drop1(x))))


def fuse_gelu(blocks: Iterable[nn.Module]) -> None:
    """Let the MLPs of timm's blocks be :class:`GeluMlp`, in place, if their activation is the exact GELU."""
    for block in blocks:
        mlp = getattr(block, "mlp", None)
        if type(mlp) is timm.layers.Mlp and type(mlp.act) is nn.GELU and mlp.act.approximate == "none":
            mlp.__class__ = GeluMlp


def _create(name: str, image_size: int, patch_size: int, own: dict[str, int], **options: Any) -> Any:
    """Create a timm model without head, of a kind that :class:`PlainViT` can split."""
    check_model_name(name)
    sizes: dict[str, Any] = {key: value for key, value in own.items() if value}
    if patch_size:
        sizes["patch_size"] = patch_size
    options |= {"num_classes": 0, "global_pool": "", "dynamic_img_size": True}
    try:
        model = timm.create_model(name, img_size=image_size, **sizes, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"MODEL.VIT.NAME={name!r}: not a plain vision transformer ({error})") from error
    rope_mixed = getattr(model, "rope_mixed", False)
    if not isinstance(model, (VisionTransformer, Eva)) or rope_mixed or isinstance(model.norm, nn.Identity):
        raise ValueError(
            f"MODEL.VIT.NAME={name!r}: a {type(model).__name__} cannot be taken apart here; use a ViT with a final "
            "norm, e.g. vit_small_patch14_reg4_dinov2 or vit_small_patch16_dinov3"
        )
    side = model.patch_embed.patch_size[0]
    if image_size < side:
        raise ValueError(f"MODEL.VIT.IMG_SIZE={image_size}: smaller than one patch, {side} pixels")
    # A norm after pooling belongs to the classifier.
    model.fc_norm = nn.Identity()
    fuse_gelu(model.blocks)
    return model


def _check_table(table: Tensor | None, model: Any, path: str) -> None:
    """Raise a ValueError if a file's position table [1, rows, D] is not one that timm can resize for the model."""
    if table is None or model.pos_embed is None:
        return
    # DINOv2's own files have a row for the class token, which timm's models with registers drop.
    extras = (0, 1) if model.no_embed_class else (model.num_prefix_tokens,)
    squares = [rows for rows in (table.numel() // model.embed_dim - extra for extra in extras) if _is_square(rows)]
    if table.ndim != 3 or table.shape[-1] != model.embed_dim or not squares:
        raise ValueError(
            f"MODEL.VIT.WEIGHTS {path}: a position table of shape {list(table.shape)} does not fit "
            f"{type(model).__name__}: expected [1, rows, {model.embed_dim}], a square of patches with "
            f"{' or '.join(map(str, extras))} rows in front; is it a file of MODEL.VIT.NAME?"
        )


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def resize_table(table: Tensor, wanted: Sequence[int], prefix: int, name: str = "pos_embed") -> Tensor:
    """Resize a position table [1, rows, D] to another square of patches, interpolated as timm does.

    Args:
        table: for a square of patches, with or without rows for prefix tokens in front.
        wanted: shape of the result.
        prefix: P of the model.
        name: for messages.

    Raises:
        ValueError: the rows do not belong to a square of patches, or the width is another one.
    """
    if table.ndim != 3 or table.shape[-1] != wanted[-1]:
        raise ValueError(f"{name}: a table of shape {list(table.shape)} does not fit a model with {list(wanted)}")
    for extra in dict.fromkeys((0, prefix, 1)):
        sides = [round(max(rows - extra, 0) ** 0.5) for rows in (table.shape[1], wanted[1])]
        if all(side and side * side == rows - extra for side, rows in zip(sides, (table.shape[1], wanted[1]))):
            old, new = sides
            return timm.layers.resample_abs_pos_embed(
                table, new_size=[new, new], old_size=[old, old], num_prefix_tokens=extra
            )
    raise ValueError(
        f"{name}: a position table of {table.shape[1]} rows does not fit one of {wanted[1]}: neither is a square of "
        f"patches with 0 or {prefix} rows in front; set MODEL.VIT.IMG_SIZE and PATCH_SIZE to those of the file"
    )
