"""Scores of a frozen segmentor, kept on disk between epochs.

Without augmentation, a frame's scores never change. Axes: K classes, h w cells of the working grid.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from the_mask.config.compose import flat_keys
from the_mask.data.clips import Clip
from the_mask.data.files import atomic_write, inside, write_inside
from the_mask.data.pickle_names import UnreadableError, UnsafePickleError
from the_mask.data.tensor_files import load_torch
from the_mask.modeling.digest import weights_digest

FINGERPRINT = "segmentor.txt"


class ScoreCache:
    """A folder of float16 score maps, ``<data set>/<video>/<frame>.pt``, of one segmentor.

    Several processes may share it, because files are written atomically.
    """

    def __init__(self, folder: str | Path, geometry: str = "") -> None:
        """
        Args:
            folder: created when needed.
            geometry: other settings that the scores depend on (sizes, stride); a folder with other settings is refused.
        """
        self.folder = Path(folder)
        self.geometry = geometry
        self._checked = False

    def path(self, clip: Clip, position: int) -> Path:
        """File of one frame of a clip."""
        return inside(self.folder, *_names(clip, position))

    def read(self, clip: Clip, position: int, segmentor: nn.Module) -> Tensor | None:
        """Scores [K, h, w], float16; None if they are not stored yet, or were made from another picture.

        Raises:
            ValueError: the folder belongs to another segmentor, or a file of it is damaged.
        """
        self._check(segmentor)
        path = self.path(clip, position)
        if not path.is_file():
            return None
        try:
            content = load_torch(path)
        except (UnreadableError, UnsafePickleError) as error:
            raise ValueError(f"{path} (MODEL.KEYFRAME.CACHE_DIR) is damaged: delete it ({error})") from error
        # Files of older versions hold only scores, which may belong to another picture.
        if not isinstance(content, dict) or content.get("frame") != _digest(clip.frames[position]):
            return None
        scores = content.get("scores")
        if not isinstance(scores, Tensor) or scores.dim() != 3 or scores.dtype != torch.float16:
            raise ValueError(f"{path} (MODEL.KEYFRAME.CACHE_DIR) is damaged: delete it (it holds no scores [K, h, w])")
        return scores

    def write(self, clip: Clip, position: int, scores: Tensor) -> Tensor:
        """Store scores, and return them as they will be read."""
        kept = scores.half().cpu()
        content = {"frame": _digest(clip.frames[position]), "scores": kept}
        write_inside(self.folder, *_names(clip, position), content=lambda stream: torch.save(content, stream))
        return kept

    def _check(self, segmentor: nn.Module) -> None:
        """On first use, compare the segmentor with the one that the folder was made by."""
        if self._checked:
            return
        mine = weights_digest(segmentor, self.geometry)
        note = self.folder / FINGERPRINT
        if note.is_file() and note.read_bytes().strip() != mine.encode():
            raise ValueError(
                f"{self.folder} (MODEL.KEYFRAME.CACHE_DIR) holds scores of another segmentor or frame size: "
                "delete it or choose another folder"
            )
        if not note.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(note, f"{mine}\n".encode())
        self._checked = True


def _names(clip: Clip, position: int) -> tuple[str, str, str]:
    return clip.dataset, clip.video_id, f"{clip.frame_ids[position]}.pt"


def _digest(frame: Tensor) -> str:
    return hashlib.sha256(frame.cpu().contiguous().numpy().tobytes()).hexdigest()


def cache_from_config(cfg: CfgNode) -> ScoreCache | None:
    """The cache of ``MODEL.KEYFRAME.CACHE_DIR``, or None.

    Raises:
        ValueError: training frames are augmented, so that scores would differ from epoch to epoch.
    """
    options, given = cfg.MODEL.KEYFRAME, cfg.INPUT
    if not options.CACHE_DIR:
        return None
    moving = [
        name
        for name, is_fixed in (
            ("INPUT.RESIZE.MIN_SCALE and MAX_SCALE 1.0", given.RESIZE.MIN_SCALE == given.RESIZE.MAX_SCALE == 1),
            ("INPUT.CROP.ENABLED False", not given.CROP.ENABLED),
            ("INPUT.RANDOM_FLIP none", given.RANDOM_FLIP == "none"),
            ("INPUT.COLOR_JITTER none", given.COLOR_JITTER == "none"),
            ("INPUT.PSEUDO_CLIP.ENABLED False", not given.PSEUDO_CLIP.ENABLED),
        )
        if not is_fixed
    ]
    if moving:
        raise ValueError(f"MODEL.KEYFRAME.CACHE_DIR needs frames without augmentation: set {', '.join(moving)}")
    box = (given.RESIZE.LONG_EDGE, given.RESIZE.SHORT_EDGE)
    # Switches of the segmentor that do not show in its weights.
    kept = {key: value for key, value in cfg.MODEL.items() if key not in ("KEYFRAME", "WEIGHTS", "DEVICE")}
    # Sorted, because the order in which keys are declared means nothing.
    segmentor = sorted(flat_keys(kept), key=lambda item: item[0])
    settings = (box, options.STRIDE, options.KEY_SCALE, options.RELEASED, segmentor)
    return ScoreCache(options.CACHE_DIR, geometry=repr(settings))
