"""Parameter groups, optimisers and gradient clipping.

The grouping rules are those of Mask2Former's training script: the backbone at a fraction of the learning rate, no decay
for norms and embeddings. There are two intentional differences: parameters that are embedding or position tables
(``level_embed``, ``pos_embed``, ...) are treated as embeddings, and backbone norms are not decayed (THE-Mask's released
configuration decays them because of its name matching).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from the_mask.config.keys.solver import CLIP_TYPES, OPTIMIZERS, LayerDecayOptions
from the_mask.engine.layer_decay import layer_decay_factors
from the_mask.weights.sharding import like, whole

logger = logging.getLogger(__name__)


NORM_TYPES: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)
# Tables of relative positions and absolute position embeddings of windowed and plain transformers: never decayed.
UNDECAYED_TABLES = ("relative_position_bias_table", "absolute_pos_embed", "rel_pos_h", "rel_pos_w")
# Parameters that are embeddings outside an nn.Embedding.
EMBEDDING_PARAMETERS = (
    "level_embed",
    "pos_embed",
    "position_embedding",
    "query_embed",
    "query_feat",
    "cls_token",
    "reg_token",
    "mask_token",
)
UNIFORM = LayerDecayOptions()


@dataclass(frozen=True)
class ParameterRule:
    """Rules for the group of a parameter.

    Attributes:
        weight_decay: for everything without another rule.
        weight_decay_norm: scale and shift of normalisation layers.
        weight_decay_embed: embeddings and position tables.
        weight_decay_bias: biases outside norms and embeddings; ``None`` treats them like other vectors.
        weight_decay_vector: other parameters of one axis (layer scales); ``None`` treats them like weights.
        no_decay: substrings of the full names of parameters that are not decayed at all.
        backbone_multiplier: factor on the learning rate of the backbone.
        layer_decay: further factors on the learning rate, per layer or stage.
        two_stages: the backbone has its own learning rate, see :class:`the_mask.engine.schedule.WarmupPoly`.
    """

    weight_decay: float
    weight_decay_norm: float = 0.0
    weight_decay_embed: float = 0.0
    weight_decay_bias: float | None = None
    weight_decay_vector: float | None = None
    no_decay: tuple[str, ...] = ()
    backbone_multiplier: float = 1.0
    layer_decay: LayerDecayOptions = UNIFORM
    two_stages: bool = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> ParameterRule:
        solver = cfg.SOLVER
        return cls(
            weight_decay=solver.WEIGHT_DECAY,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            weight_decay_embed=solver.WEIGHT_DECAY_EMBED,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
            weight_decay_vector=solver.WEIGHT_DECAY_VECTOR,
            no_decay=tuple(solver.NO_DECAY),
            backbone_multiplier=solver.BACKBONE_MULTIPLIER,
            layer_decay=LayerDecayOptions.from_config(cfg),
            two_stages=solver.BACKBONE_WARMUP_ITERS > 0,
        )


@dataclass(frozen=True)
class ParameterSetting:
    """Learning-rate factor and weight decay of one parameter, and whether it follows the backbone's warm-up."""

    lr_multiplier: float
    weight_decay: float
    second_stage: bool = False


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer: a known type, or a leaf with a matching class name (``RMSNorm``)."""
    if isinstance(module, NORM_TYPES):
        return True
    return "Norm" in type(module).__name__ and next(module.children(), None) is None


def parameter_setting(module_name: str, module: nn.Module, name: str, rule: ParameterRule) -> ParameterSetting:
    """Setting of one parameter from the names and the type of the module that owns it, without layer decay.

    Args:
        module_name: dotted path of the owning module, ``"backbone.res2.0.conv1"``.
        module: the owning module.
        name: the parameter's own name inside it, ``"weight"``.
        rule: the numbers.
    """
    in_backbone = "backbone" in module_name.split(".") or module_name.startswith("backbone")
    full_name = f"{module_name}.{name}" if module_name else name
    if any(table in name for table in UNDECAYED_TABLES) or any(part in full_name for part in rule.no_decay):
        decay = 0.0
    elif is_norm(module):
        decay = rule.weight_decay_norm
    elif isinstance(module, nn.Embedding) or name in EMBEDDING_PARAMETERS:
        decay = rule.weight_decay_embed
    elif name == "bias" and rule.weight_decay_bias is not None:
        decay = rule.weight_decay_bias
    elif rule.weight_decay_vector is not None and getattr(module, name).ndim == 1:
        decay = rule.weight_decay_vector
    else:
        decay = rule.weight_decay
    multiplier = rule.backbone_multiplier if in_backbone else 1.0
    return ParameterSetting(multiplier, decay, in_backbone and rule.two_stages)


def named_settings(model: nn.Module, rule: ParameterRule) -> Iterator[tuple[str, nn.Parameter, ParameterSetting]]:
    """Each trainable parameter once (shared ones under their first name), with its full name and setting."""
    factors = layer_decay_factors((name for name, _ in model.named_parameters()), rule.layer_decay)
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            full_name = f"{module_name}.{name}" if module_name else name
            setting = parameter_setting(module_name, module, name, rule)
            yield full_name, parameter, replace(setting, lr_multiplier=setting.lr_multiplier * factors[full_name])


def parameter_groups(model: nn.Module, rule: ParameterRule) -> list[dict[str, Any]]:
    """Optimiser groups, one per distinct setting, in the order of first appearance.

    Returns:
        dicts with ``params``, ``names`` (parallel to ``params``), ``lr_multiplier``, ``weight_decay`` and
        ``second_stage``.

    Raises:
        ValueError: no trainable parameter.
    """
    groups: dict[ParameterSetting, dict[str, Any]] = {}
    for name, parameter, setting in named_settings(model, rule):
        group = groups.setdefault(
            setting,
            {"params": [], "names": [], **asdict(setting)},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ValueError("the model has no trainable parameter; see MODEL.THE_MASK.TRAINABLE")
    return list(groups.values())


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD over :func:`parameter_groups`.

    Raises:
        ValueError: unknown ``SOLVER.OPTIMIZER``.
    """
    groups = parameter_groups(model, ParameterRule.from_config(cfg))
    base_lr = cfg.SOLVER.BASE_LR
    for group in groups:
        group["lr"] = base_lr * group["lr_multiplier"]
    kind = cfg.SOLVER.OPTIMIZER
    if kind == "ADAMW":
        # On a CPU PyTorch would update tensor by tensor with ten passes over each: four times as long.
        on_cpu = all(type(p) is nn.Parameter and p.device.type == "cpu" for group in groups for p in group["params"])
        return torch.optim.AdamW(groups, lr=base_lr, fused=True if on_cpu else None)
    if kind == "SGD":
        return torch.optim.SGD(groups, lr=base_lr, momentum=cfg.SOLVER.MOMENTUM, nesterov=cfg.SOLVER.NESTEROV)
    raise ValueError(f"SOLVER.OPTIMIZER {kind!r}: expected one of {', '.join(OPTIMIZERS)}")


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, backbone_lr: float | None = None) -> None:
    """Set every group's rate to ``lr`` (``backbone_lr`` in the second stage) times its multiplier."""
    for group in optimizer.param_groups:
        own = lr if backbone_lr is None or not group["second_stage"] else backbone_lr
        group["lr"] = own * group["lr_multiplier"]


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State of an optimiser by parameter **name**, without its hyper-parameters.

    Names are independent of the grouping. Hyper-parameters are left out, so that a resumed run follows its config.
    """
    state = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if parameter in optimizer.state:
                state[name] = dict(optimizer.state[parameter])
    return {"kind": type(optimizer).__name__, "state": state}


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load the result of :func:`optimizer_state`.

    Raises:
        ValueError: another kind of optimiser, or state of parameters that are not trained here.
    """
    if saved["kind"] != type(optimizer).__name__:
        raise ValueError(
            f"the checkpoint was written by {saved['kind']}, this run uses {type(optimizer).__name__}; set "
            "SOLVER.OPTIMIZER back, or start from the weights alone (MODEL.WEIGHTS, without --resume)"
        )
    names = [name for group in optimizer.param_groups for name in group["names"]]
    strange = sorted(set(saved["state"]) - set(names))
    if strange:
        raise ValueError(
            f"the optimiser state does not fit: {len(strange)} parameters with state are not trained here "
            f"{strange[:3]}; start from the weights alone (MODEL.WEIGHTS, without --resume)"
        )
    absent = sorted(set(names) - set(saved["state"]))
    if absent and saved["state"]:
        # They had no gradient yet, or were frozen.
        logger.warning("%d parameters start with a fresh optimiser state: %s", len(absent), absent[:3])
    _check_states(saved["state"], {n: p for g in optimizer.param_groups for n, p in zip(g["names"], g["params"])})
    state = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state["state"] = {
        index: {key: _as_parameter(value, parameter) for key, value in saved["state"][name].items()}
        for index, (name, parameter) in enumerate(zip(names, parameters, strict=True))
        if name in saved["state"]
    }
    optimizer.load_state_dict(state)


def _check_states(states: Mapping[str, Mapping[str, Any]], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise unless each parameter's state is made of numbers and of tensors that fit it, under the same names."""
    keys = {key for own in states.values() for key in own}
    tensors = {key for own in states.values() for key, value in own.items() if isinstance(value, Tensor)}
    for name, own in states.items():
        for key in keys:
            value = own.get(key, ...)
            # SGD without momentum keeps None, for all parameters.
            plain = isinstance(value, (int, float)) or (value is None and key == "momentum_buffer")
            fits = plain and key not in tensors
            if isinstance(value, Tensor):
                fits = value.numel() == 1 or value.shape == parameters[name].shape
            if not fits:
                raise ValueError(f"the optimiser state is damaged: {key!r} of {name}")


def _as_parameter(value: Any, parameter: nn.Parameter) -> Any:
    """Shard state of the parameter's shape like the parameter; return anything else unchanged."""
    return like(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value


def clip_gradients(
    parameters: Iterable[nn.Parameter], clip_type: str, value: float, norm_type: float = 2.0
) -> Tensor | None:
    """Clip gradients in place.

    Args:
        parameters: parameters; those with a gradient are clipped.
        clip_type: ``"full_model"``, one norm over all parameters (Mask2Former); ``"norm"``, one per
            parameter; ``"value"``, each entry separately.
        value: largest norm or absolute value.
        norm_type: order of the norm.

    Returns:
        The norm over all parameters before clipping (scalar tensor), for ``"full_model"``; otherwise ``None``.

    Raises:
        ValueError: unknown ``clip_type``.
    """
    parameters = [p for p in parameters if p.grad is not None]
    if clip_type == "full_model":
        return whole(nn.utils.clip_grad_norm_(parameters, value, norm_type=norm_type))
    if clip_type == "norm":
        for parameter in parameters:
            nn.utils.clip_grad_norm_([parameter], value, norm_type=norm_type)
    elif clip_type == "value":
        nn.utils.clip_grad_value_(parameters, value)
    else:
        raise ValueError(f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE {clip_type!r}: expected one of {', '.join(CLIP_TYPES)}")
    return None
