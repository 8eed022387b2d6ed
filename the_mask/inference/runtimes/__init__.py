"""Runtimes: the networks of a segmentor run in PyTorch, ``torch.compile``, ONNX Runtime or OpenVINO.

:func:`use_runtime` replaces the parts of a model that are plain functions of tensors (backbone, decoder, propagator).
Streams, batching, keyframe policies and test-time views around them are unchanged.
"""

from the_mask.inference.runtimes.cache import RuntimeCache
from the_mask.inference.runtimes.choose import BACKENDS, PRECISIONS, RuntimeReport, use_runtime
from the_mask.inference.runtimes.prepare import prepare_stream
from the_mask.inference.runtimes.quantize import calibration_clips

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "RuntimeCache",
    "RuntimeReport",
    "calibration_clips",
    "prepare_stream",
    "use_runtime",
]
