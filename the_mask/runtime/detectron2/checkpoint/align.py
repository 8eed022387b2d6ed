"""Matching of checkpoint keys to model keys by their ends."""

from __future__ import annotations

import logging

from torch import Tensor


def align_and_update_state_dicts(
    model_state_dict: dict[str, Tensor], ckpt_state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Rename the keys of a checkpoint to those of a model.

    A model key takes the checkpoint key that is its longest suffix at a ``.`` (or the whole key). So ``backbone.`` and
    the like may be missing in the checkpoint.

    Args:
        model_state_dict: the model's.
        ckpt_state_dict: the checkpoint's.

    Returns:
        The checkpoint under the model's names. Tensors without a match, or of another shape, keep their own name.

    Raises:
        ValueError: one checkpoint key matches two model keys.
    """
    logger = logging.getLogger(__name__)
    result = dict(ckpt_state_dict)
    taken: dict[str, str] = {}
    for model_key in sorted(model_state_dict):
        ckpt_key = _longest_suffix(model_key, ckpt_state_dict)
        if ckpt_key is None:
            continue
        wanted, given = model_state_dict[model_key].shape, ckpt_state_dict[ckpt_key].shape
        if wanted != given:
            logger.warning(
                "Shape of %s in checkpoint is %s, while shape of %s in model is %s. It will not be loaded.",
                ckpt_key,
                tuple(given),
                model_key,
                tuple(wanted),
            )
            continue
        if ckpt_key in taken:
            logger.error("Ambiguity: %s in the checkpoint matches %s and %s", ckpt_key, taken[ckpt_key], model_key)
            raise ValueError("Cannot match one checkpoint key to multiple keys in the model.")
        taken[ckpt_key] = model_key
    if not taken:
        logger.warning("No weights in checkpoint matched with model.")
    for ckpt_key in taken:
        del result[ckpt_key]
    result.update({model_key: ckpt_state_dict[ckpt_key] for ckpt_key, model_key in taken.items()})
    return result


def _longest_suffix(key: str, candidates: dict[str, Tensor]) -> str | None:
    parts = key.split(".")
    for start in range(len(parts)):
        suffix = ".".join(parts[start:])
        if suffix in candidates:
            return suffix
    return None
