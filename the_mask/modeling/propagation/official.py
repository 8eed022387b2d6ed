"""Names of released checkpoints, one function per format.

Each takes a tensor's name in the release and gives the name in a ``ClipSegmentor`` (segmentors) or a ``GSVNet``
(propagators).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

BISENET_BACKBONE = ("spatial_path", "context_path")


def swiftnet_name(name: str) -> str:
    """SwiftNet-R18: ``backbone.{conv1, layer1, spp, upsample, ...}``, ``logits``.

    The stored image statistics (``backbone.img_mean``, ``img_std``) are not used: set MODEL.PIXEL_MEAN and PIXEL_STD.
    """
    for part in ("spp", "upsample"):
        if name.startswith(f"backbone.{part}."):
            return name.replace("backbone.", "sem_seg_head.", 1)
    return f"sem_seg_head.{name}" if name.startswith("logits.") else name


def bisenet_name(name: str) -> str:
    """TorchSeg's BiSeNet-R18: ``spatial_path``, ``context_path``, ``arms``, ``ffm``, ``heads`` and so on."""
    return f"backbone.{name}" if name.split(".")[0] in BISENET_BACKBONE else f"sem_seg_head.{name}"


def gsvnet_state(checkpoint: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """State dict of :class:`GSVNet` (variant "official") from a release: ``state_dict`` and ``state_dict_of``.

    Raises:
        ValueError: one of the two parts is missing.
    """
    missing = [part for part in ("state_dict", "state_dict_of") if part not in checkpoint]
    if missing:
        raise ValueError(f"a GSVNet checkpoint holds state_dict and state_dict_of; {', '.join(missing)} is missing")
    state = {f"flow.{_bare(name)}": value for name, value in checkpoint["state_dict_of"].items()}
    return state | {
        _bare(name): value for name, value in checkpoint["state_dict"].items() if _bare(name).startswith("grm.")
    }


def _bare(name: str) -> str:
    return name.removeprefix("module.")
