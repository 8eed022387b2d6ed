"""Temporal consistency (TC): agreement of each prediction with the next one, warped by the optical flow.

Used for VSPW by Miao et al. (CVPR 2021), after Liu et al., "Efficient semantic video segmentation" (ECCV 2020).

Axes: ``L`` frames of a video, ``K`` classes, ``H W`` frame size.

For each pair (t, t+1) the prediction of t+1 is warped to t by the flow t -> t+1 with nearest sampling; a confusion
matrix with prediction t as the reference is pooled over all pairs, and TC is its mean IoU over the classes that occur
in the reference. Ground truth is not used. There are two ways to warp:

* ``strict``: the nearest pixel centre; pixels whose flow leaves the frame are left out;
* ``compat``, the script of VSPW: positions are normalised by W-1 but sampled with ``align_corners=False``, a shift of
  up to half a pixel, and what lies outside the frame is class 0.

The caller chooses the videos; the script uses the first 100.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from the_mask.data.label_maps import LabelMap, as_label_array
from the_mask.data.tensor_files import read_tensors
from the_mask.evaluation.metrics import confusion_matrix, iou_from_confusion

FlowFunction = Callable[[NDArray[np.uint8], NDArray[np.uint8]], NDArray[np.floating]]
"""(frame t, frame t+1), uint8 RGB [H, W, 3] each -> flow [H, W, 2] in pixels, (x, y): x_{t+1} = x_t + flow."""

TC_MODES = ("strict", "compat")
# RAFT uses features of 1/8 resolution over four pyramid levels, in which smaller inputs vanish.
_RAFT_MULTIPLE, _RAFT_MIN_SIDE = 8, 128


def warp_labels_compat(labels: LabelMap, flow: NDArray[np.floating]) -> NDArray[np.integer]:
    """As :func:`warp_labels`, but as in VSPW's script; [H, W], class 0 where the flow leaves the frame."""
    array = as_label_array(labels)
    height, width = array.shape
    rows, columns = np.mgrid[:height, :width]
    position = np.stack([columns, rows], axis=-1).astype(np.float32) + flow.astype(np.float32)
    # A flow that is not finite points nowhere: outside the frame.
    position = np.where(np.isfinite(position), position, np.float32(-2.0 * max(height, width)))
    last = np.array([max(width - 1, 1), max(height - 1, 1)], dtype=np.float32)
    grid = torch.from_numpy(2 * position / last - 1)[None]
    # Ids up to 65535 are exact in float32.
    source = torch.from_numpy(array.astype(np.float32))[None, None]
    warped = functional.grid_sample(source, grid, mode="nearest", align_corners=False)
    return warped[0, 0].numpy().astype(array.dtype)


def warp_labels(labels: LabelMap, flow: NDArray[np.floating]) -> tuple[NDArray[np.integer], NDArray[np.bool_]]:
    """Warp a label map of frame t+1 to frame t.

    Args:
        labels: class ids of frame t+1, [H, W].
        flow: [H, W, 2], pixels (x, y), from t to t+1.

    Returns:
        ``(warped, valid)``, both [H, W]: the label at the nearest pixel of ``x + flow(x)`` (halves round up), and
        whether that pixel is inside the frame. ``warped`` is undefined where ``valid`` is False.

    Raises:
        ValueError: shapes do not fit.
    """
    array = as_label_array(labels)
    if array.ndim != 2 or flow.shape != (*array.shape, 2):
        raise ValueError(f"labels [H, W] and flow [H, W, 2] expected, got {array.shape} and {flow.shape}")
    height, width = array.shape
    rows, columns = np.mgrid[:height, :width]
    # A flow that is not finite points nowhere: outside the frame.
    target = np.where(np.isfinite(flow), flow, -2.0 * max(height, width))
    x = np.floor(columns + target[..., 0] + 0.5)
    y = np.floor(rows + target[..., 1] + 0.5)
    valid = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = np.clip(x, 0, width - 1).astype(np.intp), np.clip(y, 0, height - 1).astype(np.intp)
    return array[y, x], valid


class TemporalConsistency:
    """Streaming TC. Frames must be in time order. Keeps the last frame, its prediction and a matrix per mode.

    Args:
        num_classes: K.
        flow: optical flow, see :data:`FlowFunction`; ``raft_flow`` makes one from a weights file.
        ignore_label: a pixel is left out where either prediction has this value.
    """

    def __init__(self, num_classes: int, flow: FlowFunction, ignore_label: int = 255) -> None:
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.confusion = {mode: np.zeros((num_classes, num_classes), dtype=np.int64) for mode in TC_MODES}
        self.pairs = 0
        self._flow = flow
        self._last: tuple[NDArray[np.uint8], NDArray[np.integer]] | None = None

    @property
    def last_shape(self) -> tuple[int, ...] | None:
        """(H, W) of the current video's last frame; None before its first."""
        return None if self._last is None else self._last[1].shape

    def update(self, frame: NDArray[np.uint8], pred: LabelMap) -> None:
        """Add the next frame of the current video.

        Args:
            frame: uint8 RGB [H, W, 3].
            pred: class ids [H, W] in 0..K-1.

        Raises:
            ValueError: frame and prediction differ in size from each other or from the previous frame; illegal ids.
        """
        labels = as_label_array(pred, "prediction").copy()
        if frame.shape != (*labels.shape, 3):
            raise ValueError(f"frame [H, W, 3] of the prediction's size {labels.shape} expected, got {frame.shape}")
        if self._last is not None:
            last_frame, last_labels = self._last
            if last_frame.shape != frame.shape:
                raise ValueError(f"frame size changes inside a video from {last_frame.shape} to {frame.shape}")
            flow = self._flow(last_frame, frame)
            warped, valid = warp_labels(labels, flow)
            self._count("strict", warped[valid], last_labels[valid])
            self._count("compat", warp_labels_compat(labels, flow), last_labels)
            self.pairs += 1
        self._last = (frame, labels)

    def _count(self, mode: str, warped: NDArray[np.integer], reference: NDArray[np.integer]) -> None:
        valid = warped != self.ignore_label
        self.confusion[mode] += confusion_matrix(warped[valid], reference[valid], self.num_classes, self.ignore_label)

    def end_video(self) -> None:
        """End the current video; pairs never cross the end of a video."""
        self._last = None

    def result(self, mode: str = "strict") -> float:
        """TC in 0..1; NaN without a single pair."""
        return iou_from_confusion(self.confusion[mode])["mIoU"]


def temporal_consistency(
    frames: NDArray[np.uint8], pred: LabelMap, num_classes: int, flow: FlowFunction, mode: str = "strict"
) -> float:
    """TC of one video: ``frames`` uint8 RGB [L, H, W, 3], ``pred`` class ids [L, H, W]. See the module's docstring."""
    labels = as_label_array(pred, "prediction")
    meter = TemporalConsistency(num_classes, flow)
    for frame, labels_t in zip(frames, labels, strict=True):
        meter.update(frame, labels_t)
    meter.end_video()
    return meter.result(mode)


def raft_flow(weights: str | Path, device: str | torch.device = "cpu", updates: int = 20) -> FlowFunction:
    """Optical flow by torchvision's RAFT (large or small, depending on the file). Never downloads anything.

    Args:
        weights: a state dict of ``torchvision.models.optical_flow.raft_large`` or ``raft_small``.
        device: where to run.
        updates: recurrent refinements (20 in the official VSPW script).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file does not hold weights of torchvision's RAFT.
    """
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"RAFT weights {path} do not exist; pass a torchvision RAFT file, or none to leave TC out"
        )
    model = _load_raft(path).to(device).eval()

    @torch.no_grad()
    def flow(frame: NDArray[np.uint8], following: NDArray[np.uint8]) -> NDArray[np.floating]:
        height, width = frame.shape[:2]
        pair = [_raft_input(image).to(device) for image in (frame, following)]
        field: Tensor = model(*pair, num_flow_updates=updates)[-1]
        return field[0, :, :height, :width].permute(1, 2, 0).cpu().numpy()

    return flow


def _load_raft(path: Path) -> nn.Module:
    # Imported here, because torchvision's models take a second to import and most runs need no flow.
    from torchvision.models.optical_flow import raft_large, raft_small

    state = read_tensors(path, "file of RAFT's weights")
    candidates = {"raft_large": raft_large, "raft_small": raft_small}
    for build in candidates.values():
        model = build(weights=None)
        expected = model.state_dict()
        if (
            isinstance(state, dict)
            and state.keys() == expected.keys()
            and all(state[key].shape == value.shape for key, value in expected.items())
        ):
            model.load_state_dict(state)
            return model
    first = next(iter(state), "nothing") if isinstance(state, dict) else type(state).__name__
    raise ValueError(
        f"RAFT weights {path} fit neither of torchvision's {' and '.join(candidates)} (first key: {first}); the "
        "original princeton-vl files use other names, torchvision's converted ones are needed"
    )


def _raft_input(image: NDArray[np.uint8]) -> Tensor:
    """uint8 RGB [H, W, 3] -> float [1, 3, H', W'] in -1..1, padded at the bottom and right with its border pixels."""
    tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1.0
    height, width = tensor.shape[-2:]
    padding = [max(_RAFT_MIN_SIDE, -(-side // _RAFT_MULTIPLE) * _RAFT_MULTIPLE) - side for side in (height, width)]
    return functional.pad(tensor, (0, padding[1], 0, padding[0]), mode="replicate")
