"""Video frame by frame: the same call for files, webcams, evaluation and benchmarks.

Axes: H W size of the source frame, K classes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from the_mask.config import load_config
from the_mask.data.augmentation import fit_size, resize_image, round_up
from the_mask.modeling.build import build_segmentor
from the_mask.modeling.scores import label_map, resize_scores
from the_mask.weights.trained import trained

StreamState = dict[str, Any]
OUTPUTS = ("labels", "scores")
OUTPUT_STRIDES = (1, 4, 8)


class StreamingSegmentor:
    """Segments streams of RGB frames; everything a stream leaves behind is in its state.

    One object serves any number of streams at a time, each with its own state::

        segmentor = StreamingSegmentor(cfg)
        state = segmentor.init_state()
        for frame in frames:
            labels, state = segmentor.step(frame, state)

    The state is a plain dict of tensors, numbers and lists: bounded, and ``torch.load(weights_only=True)`` reads it.
    """

    def __init__(
        self,
        source: CfgNode | nn.Module,
        model: nn.Module | None = None,
        output: str = "labels",
        trust_pickle: bool = False,
        output_stride: int = 1,
    ) -> None:
        """Wrap a segmentor, or build the one of a config.

        Args:
            source: a config, whose ``INPUT.TEST`` gives the network size; or a segmentor, for the default network size.
            model: with a config: a segmentor with ``init_state``, ``step`` and ``score_stride``; ``None`` builds the
                config's model and fills it from ``MODEL.WEIGHTS``. A segmentor is put in eval mode.
            output: "labels" or "scores".
            trust_pickle: of ``the_mask.engine.load_weights``, when weights are read.
            output_stride: 1 gives results at the size of the frame, 4 and 8 at a quarter and an eighth of it.

        Raises:
            ValueError: unknown ``output`` or ``output_stride``, or neither a model nor weights.
        """
        if output not in OUTPUTS:
            raise ValueError(f"output is {output!r}; expected one of {', '.join(OUTPUTS)}")
        if output_stride not in OUTPUT_STRIDES:
            raise ValueError(f"output_stride is {output_stride}; expected one of {', '.join(map(str, OUTPUT_STRIDES))}")
        if isinstance(source, CfgNode):
            cfg = source
        else:
            cfg, model = load_config(), source
        self.model: Any = (trained(cfg, trust_pickle=trust_pickle) if model is None else model).eval()
        self.output = output
        self.output_stride = output_stride
        self.box = (cfg.INPUT.TEST.LONG_EDGE, cfg.INPUT.TEST.SHORT_EDGE)
        self.size_multiple = cfg.INPUT.TEST.SIZE_MULTIPLE

    def init_state(self) -> StreamState:
        """Return the state before a video: ``size`` [H, W] of its frames, ``resets``, and the model's own state."""
        return {"size": [], "resets": 0, "model": self.model.init_state()}

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """Size a frame of this size is resized to, as in the clip mapper: fitted, then both sides rounded up."""
        return round_up(fit_size(height, width, self.box), self.size_multiple)

    def prepare(self, frame: np.ndarray | Tensor) -> Tensor:
        """Resize a uint8 RGB frame [H, W, 3] to the network size: uint8 [3, h, w].

        Raises:
            ValueError: not such a frame.
        """
        image = _as_image(frame)
        resized = resize_image(image, self.network_size(image.shape[0], image.shape[1]))
        return torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))

    def finish(self, scores: Tensor, network_size: tuple[int, int], frame_size: tuple[int, int]) -> Tensor:
        """Turn the model's scores into what :meth:`step` returns, in row tiles: labels never have all classes at once.

        Args:
            scores: [K, h, w] at the model's ``score_stride``.
            network_size, frame_size: (height, width) of the prepared and of the source frame.
        """
        height, width = (math.ceil(side / self.output_stride) for side in frame_size)
        function = label_map if self.output == "labels" else resize_scores
        return function(scores, network_size, (height, width), self.model.score_stride)

    def step(self, frame: np.ndarray | Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """Segment the next frame.

        Args:
            frame: uint8 RGB [H, W, 3]. A frame of another size than the last one starts the stream anew, which is
                counted in ``state["resets"]``.
            state: of :meth:`init_state` or the last step; not changed.

        Returns:
            labels: uint8 (int32 with more than 255 classes) [H, W] on the CPU; or scores: [K, H, W] float32 on the
            model's device; with an ``output_stride`` s [ceil(H/s), ceil(W/s)]; and the new state.

        Raises:
            ValueError: not a uint8 RGB frame, a foreign state, or scores that are not finite.
        """
        pixels = self.prepare(frame)
        if not isinstance(state, dict) or set(state) != {"size", "resets", "model"}:
            raise ValueError("not a state of StreamingSegmentor; make one with init_state()")
        height, width = frame.shape[:2]
        changed = bool(state["size"]) and list(state["size"]) != [height, width]
        model_state = self.model.init_state() if changed else state["model"]
        scores, model_state = self.model.step(pixels, model_state)
        state = {"size": [height, width], "resets": state["resets"] + changed, "model": model_state}
        return self.finish(scores, (pixels.shape[1], pixels.shape[2]), (height, width)), state


def build_random(cfg: CfgNode) -> nn.Module:
    """The model of a config as it is before training, in eval mode; for measurements."""
    return build_segmentor(cfg).eval()


def _as_image(frame: np.ndarray | Tensor) -> np.ndarray:
    image = frame.cpu().numpy() if isinstance(frame, Tensor) else frame
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"a frame is uint8 RGB [H, W, 3], got {image.dtype} {list(image.shape)}")
    return image
