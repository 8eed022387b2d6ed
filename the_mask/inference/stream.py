"""Segments video frame by frame; the same call is used for files, webcams, evaluation and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from torch import nn

from the_mask.config import load_config
from the_mask.inference.runtimes import BACKENDS, prepare_stream
from the_mask.inference.views import MultiView, check_output
from the_mask.modeling.build import build_segmentor
from the_mask.weights.find import find_model
from the_mask.weights.trained import trained


class StreamingSegmentor(MultiView):
    """Runs a segmentor on whole frames of any size, without test-time augmentation.

    One object can process any number of streams at the same time, each with its own state::

        segmentor = StreamingSegmentor(cfg)
        state = segmentor.init_state()
        for frame in frames:
            labels, state = segmentor.step(frame, state)
    """

    def __init__(
        self,
        source: CfgNode | nn.Module,
        model: nn.Module | None = None,
        output: str = "labels",
        trust_pickle: bool = False,
        output_stride: int = 1,
    ) -> None:
        """Wrap a segmentor, or build that of a config.

        Args:
            source: a config, whose ``INPUT.TEST`` gives the network size; or a segmentor, for the default network size.
            model: with a config: a segmentor; ``None`` builds the config's model and fills it from ``MODEL.WEIGHTS``. A
                segmentor is put in eval mode.
            output: "labels" or "scores".
            trust_pickle: of ``the_mask.engine.load_weights``, when weights are read.
            output_stride: 1 gives results at the size of the frame, 4 and 8 at a quarter and an eighth of it.

        Raises:
            ValueError: unknown ``output`` or ``output_stride``, or neither a model nor weights.
        """
        check_output(output, output_stride)
        if isinstance(source, CfgNode):
            cfg = source
        else:
            cfg, model = load_config(), source
        super().__init__(
            trained(cfg, trust_pickle=trust_pickle) if model is None else model,
            box=(cfg.INPUT.TEST.LONG_EDGE, cfg.INPUT.TEST.SHORT_EDGE),
            size_multiple=cfg.INPUT.TEST.SIZE_MULTIPLE,
            output=output,
            output_stride=output_stride,
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        refresh: bool = False,
        backend: str = "auto",
        overrides: Sequence[str] = (),
        precision: str = "float32",
        calibrate: str | Path | None = None,
    ) -> StreamingSegmentor:
        """Load a trained model by name, folder, config or hub id, ready for the frames of a video.

        Nothing is fetched but a hub model, and that once; ``HF_HUB_OFFLINE`` forbids it.

        Args:
            name_or_path, revision, token, refresh: see :func:`the_mask.weights.find.find_model`.
            backend, overrides, precision, calibrate: see :func:`the_mask.inference.load.load`.

        Raises:
            ValueError, FileNotFoundError, ModuleNotFoundError: see :func:`the_mask.inference.load.load`.
        """
        if backend not in BACKENDS:  # before the weights are read
            raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
        cfg, _ = find_model(name_or_path, overrides, refresh, revision=revision, token=token)
        segmentor = cls(cfg)
        if segmentor.model.device.type == "cpu" or precision != "float32":
            prepare_stream(segmentor, backend, precision, calibrate)
        return segmentor


def build_random(cfg: CfgNode) -> nn.Module:
    """Build the untrained model of a config, in eval mode, for measurements."""
    return build_segmentor(cfg).eval()
