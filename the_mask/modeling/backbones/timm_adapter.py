"""Any hierarchical timm model as a backbone: Swin, ConvNeXt, ResNet and others.

State-dict keys are timm's own below ``model.``. Axes: B images, H W image size, h w feature size, C channels.
"""

from __future__ import annotations

import difflib
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import timm
import timm.layers
import timm.models
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn

from the_mask.data.tensor_files import read_tensors, state_dict_of
from the_mask.modeling.backbones.common import LEVELS, STRIDES, PyramidBackbone
from the_mask.modeling.backbones.depthwise import speed_up_depthwise
from the_mask.modeling.backbones.efficientnet_names import is_first_port, to_timm_names
from the_mask.modeling.backbones.package_weights import resolve_weights


class _PadBeforeShift:
    """Window attention that pads the map to whole windows first, then shifts.

    timm shifts first, which gives different results when a side is not a multiple of the window. Published segmentation
    weights (Mask2Former, UperNet) were trained with padding first.
    """

    window_size: tuple[int, int]

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        window_height, window_width = self.window_size
        x = F.pad(x, (0, 0, 0, -width % window_width, 0, -height % window_height))
        return super()._attn(x)[:, :height, :width]  # type: ignore[misc]


class _SwinBlock(_PadBeforeShift, SwinTransformerBlock):
    pass


class _SwinV2Block(_PadBeforeShift, SwinTransformerV2Block):
    pass


SIZE_FREE_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    SwinTransformerBlock: _SwinBlock,
    SwinTransformerV2Block: _SwinV2Block,
}


def check_model_name(name: str) -> None:
    """Raise a ValueError with the nearest names unless timm has a model ``name`` (``architecture[.tag]``)."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=5, cutoff=0.5)
        hint = f"; nearest names: {', '.join(close)}" if close else ""
        raise ValueError(f"NAME={name!r}: timm {timm.__version__} has no such model{hint}")
    if tag and not timm.is_model_pretrained(name):
        known = timm.list_pretrained(f"{architecture}.*")
        raise ValueError(f"NAME={name!r}: unknown weights tag; known: {', '.join(known) or 'none'}")


def create_headless(name: str, pretrained: bool, in_channels: int, drop_path: float, **own: Any) -> Any:
    """Create a timm model without classifier, for any image size if the family supports it.

    Typed ``Any``: timm's models share methods by convention, not by a class.

    Args:
        name: timm's name, ``architecture[.tag]``.
        pretrained: download timm's weights.
        in_channels: channels of the images.
        drop_path: stochastic depth of the last block.
        own: further arguments, which the family must support.

    Raises:
        ValueError: unknown name, or stochastic depth for a family without it.
    """
    check_model_name(name)
    # Only some families have these arguments; others raise a TypeError that names them.
    optional: dict[str, Any] = {"drop_path_rate": drop_path, "strict_img_size": False, "always_partition": True}
    while True:
        try:
            model = timm.create_model(
                name, pretrained=pretrained, in_chans=in_channels, num_classes=0, **own, **optional
            )
        except TypeError as error:
            refused = [key for key in optional if f"'{key}'" in str(error)]
            if "unexpected keyword argument" not in str(error) or not refused:
                raise
            if "drop_path_rate" in refused and drop_path > 0:
                raise ValueError(f"DROP_PATH={drop_path}: {name} has no stochastic depth; use 0") from error
            for key in refused:
                del optional[key]
        else:
            return model


def choose_levels(name: str, reductions: Sequence[int], indices: Sequence[int]) -> list[int]:
    """Choose the feature levels for ``res2`` ... ``res5``: ``indices`` if given, else the last level of each stride.

    Args:
        name: the model, for messages.
        reductions: stride of every feature level of the model.
        indices: ``MODEL.TIMM.OUT_INDICES``; empty to choose by stride.

    Raises:
        ValueError: the levels do not have strides 4, 8, 16, 32.
    """
    last = {stride: level for level, stride in enumerate(reductions)}
    chosen = list(indices) or [last.get(stride, -1) for stride in STRIDES]
    valid = all(0 <= level < len(reductions) for level in chosen)
    if not valid or [reductions[level] for level in chosen] != list(STRIDES):
        raise ValueError(
            f"MODEL.TIMM.NAME={name!r}, OUT_INDICES={list(indices)}: four levels of strides {STRIDES} are needed, "
            f"levels 0..{len(reductions) - 1} of this model have strides {list(reductions)}"
        )
    return chosen


def read_weights(path: str) -> dict[str, Tensor]:
    """Read the tensors of a weights file of any safe format; averaged (EMA) weights of timm are preferred.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, of another kind, or with Python objects in it.
    """
    content = read_tensors(path, "weights file (WEIGHTS)")
    if isinstance(content, dict):
        averages = (content[key] for key in ("state_dict_ema", "model_ema") if isinstance(content.get(key), dict))
        content = next(averages, content)
    return state_dict_of(content, path)


def convert_weights(model: nn.Module, state: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Rename weights to timm's keys with the family's own converter in timm, which also knows the original layouts.

    Args:
        model: the whole model, not yet pruned.
        state: tensors of the file.
        path: for messages.

    Raises:
        ValueError: the converter fails.
    """
    # By timm's convention, a family's converter is a function in its module.
    convert: Callable[..., dict[str, Tensor]] | None
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        if is_first_port(state):
            return to_timm_names(state, [len(stage) for stage in model.blocks])  # type: ignore[union-attr]
        return state if convert is None else convert(state, model)
    except (KeyError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"WEIGHTS: {path} is of another family than {type(model).__name__}: {error}") from error


def load_exactly(model: nn.Module, state: dict[str, Tensor], expendable: Iterable[str], path: str) -> None:
    """Load ``state``, which must have every key of the model, and no others except those with ``expendable`` prefixes.

    Batch norm counters may be missing, as in files of torch before 0.4.1; they do not affect results.

    Raises:
        ValueError: missing or foreign keys, or other shapes.
    """
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    foreign = [key for key in state if key not in wanted and not key.startswith(tuple(expendable))]
    shapes = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    for kind, keys in (("missing", missing), ("foreign", foreign), ("of other shape", shapes)):
        if keys:
            raise ValueError(
                f"WEIGHTS: {path} does not fit {type(model).__name__}: {len(keys)} keys {kind}, e.g. "
                f"{', '.join(keys[:3])}"
            )
    model.load_state_dict({key: state.get(key, value) for key, value in wanted.items()})


Prepare = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def prune_and_load(model: Any, levels: Sequence[int], weights: str, prepare: Prepare | None = None) -> list[int]:
    """Remove the parts that the levels do not need, and load a local file.

    Args:
        model: timm model; changed in place.
        levels: feature levels to keep.
        weights: file, or ``package:NAME``; "" loads nothing.
        prepare: applied to what the file holds before timm's converter.

    Returns:
        The levels' numbers in the pruned model.
    """
    state: dict[str, Tensor] = {}
    weights = resolve_weights(weights)
    if weights:
        state = read_weights(weights)
        # Converters look at the model's modules, so they run before the pruning.
        state = convert_weights(model, state if prepare is None else prepare(state), weights)
    whole = set(model.state_dict())
    kept = model.prune_intermediate_layers(list(levels), prune_norm=True, prune_head=True)
    if weights:
        classifier = model.pretrained_cfg.get("classifier") or ()
        classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        load_exactly(model, state, [*classifiers, *(whole - set(model.state_dict()))], weights)
    return kept


class TimmBackbone(PyramidBackbone):
    """timm model: images [B,3,H,W] -> ``res2`` ... ``res5``, each the output of a stage of the model.

    Sides that are not multiples of the stride are rounded up (Swin) or down (ConvNeXt) as the family does; multiples
    of 32 suit every family but those of one fixed size (MaxViT, Hiera).

    Args:
        name: timm's name, ``architecture[.tag]``.
        pretrained: download timm's weights.
        weights: local file or ``package:NAME``, wins over ``pretrained``; "" for none.
        out_indices: feature levels, see :func:`choose_levels`.
        in_channels: channels of the images.
        drop_path: stochastic depth of the last block.
        out_norm: "LN" for a LayerNorm per output (keys ``norm0`` ... ``norm3``), or "".
        norm: "" or what batch norms become, "FrozenBN" or "SyncBN".
        recompute: gradient checkpointing: recompute activations in the backward pass.
        freeze_at: groups to freeze: 1 the stem, 2 also ``res2``, and so on.

    Raises:
        FileNotFoundError, ValueError: see the functions of this module; unknown ``out_norm`` or ``norm``.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        weights: str = "",
        out_indices: Sequence[int] = (),
        in_channels: int = 3,
        drop_path: float = 0.0,
        out_norm: str = "",
        norm: str = "",
        recompute: bool = False,
        freeze_at: int = 0,
    ) -> None:
        if out_norm not in ("", "LN"):
            raise ValueError(f"MODEL.TIMM.OUT_NORM={out_norm!r}: must be '' or 'LN'")
        model = create_headless(name, pretrained and not weights, in_channels, drop_path)
        reductions = [info["reduction"] for info in model.feature_info]
        levels = choose_levels(name, reductions, out_indices)
        channels = [model.feature_info[level]["num_chs"] for level in levels]
        super().__init__(channels)
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(f"MODEL.TIMM.NAME={name!r}: timm gives no access to the features of this model")
        self.levels = prune_and_load(model, levels, weights)
        adapt_to_any_size(model)
        speed_up_depthwise(model, timm.layers.Conv2dSame)
        self.model = convert_batch_norms(model, norm)
        if recompute:
            self.model.set_grad_checkpointing(True)
        # Mask2Former and UperNet add these norms to Swin and ConvNeXt; they use the family's own epsilon.
        eps = next((m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)), 1e-5)
        self.out_norm = out_norm
        for i, dim in enumerate(channels if out_norm else ()):
            self.add_module(f"norm{i}", nn.LayerNorm(dim, eps=eps))
        if freeze_at:
            self._freeze(name, freeze_at)

    @property
    def size_divisibility(self) -> int:
        return STRIDES[-1]

    def _freeze(self, name: str, freeze_at: int) -> None:
        groups = timm.models.group_parameters(self.model, self.model.group_matcher(coarse=True))
        stages = [groups.get(i, []) for i in range(len(LEVELS) + 1)]
        if len(groups) not in (5, 6) or not all(stages):
            raise ValueError(f"MODEL.BACKBONE.FREEZE_AT={freeze_at}: {name} has no stem and four stages to tell apart")
        self.freeze_stages([self._modules_within(names) for names in stages], freeze_at)
        # Parameters that do not belong to a module of the group, such as position tables.
        parameters = dict(self.model.named_parameters())
        for parameter_name in itertools.chain(*stages[:freeze_at]):
            parameters[parameter_name].requires_grad_(False)

    def _modules_within(self, names: list[str]) -> list[nn.Module]:
        """Modules that have parameters, all of which are among ``names``."""
        owned = set(names)
        modules = []
        for prefix, module in self.model.named_modules():
            own = {f"{prefix}.{name}".removeprefix(".") for name, _ in module.named_parameters()}
            if own and own <= owned:
                modules.append(module)
        return modules

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if min(x.shape[-2:]) < STRIDES[-1]:
            raise ValueError(f"images of {tuple(x.shape[-2:])} pixels: timm backbones need at least {STRIDES[-1]}")
        outputs = self.model.forward_intermediates(
            x, indices=self.levels, norm=False, output_fmt="NCHW", intermediates_only=True
        )
        if self.out_norm:
            outputs = [self._normed(getattr(self, f"norm{i}"), output) for i, output in enumerate(outputs)]
        return dict(zip(LEVELS, outputs, strict=True))

    @staticmethod
    def _normed(norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


def adapt_to_any_size(model: nn.Module) -> None:
    """Make a model pad instead of refusing a size: patch embeddings to whole patches, Swin maps to whole windows."""
    for module in model.modules():
        if isinstance(module, timm.layers.PatchEmbed):
            module.dynamic_img_pad = True  # type: ignore[misc]
        if type(module) in SIZE_FREE_BLOCKS:
            module.__class__ = SIZE_FREE_BLOCKS[type(module)]


def convert_batch_norms(model: Any, norm: str) -> Any:
    """Apply ``MODEL.TIMM.NORM`` to the batch norms (and batch norms fused with activations) of a timm model."""
    if norm == "":
        return model
    if norm == "FrozenBN":
        return timm.layers.freeze_batch_norm_2d(model)
    if norm == "SyncBN":
        return timm.layers.convert_sync_batchnorm(model)
    raise ValueError(f"MODEL.TIMM.NORM={norm!r}: must be '', 'FrozenBN' or 'SyncBN'")
