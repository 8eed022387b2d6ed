"""Sessions: one network for one layout of its arguments, from tensors to tensors.

Every session is made from an eager module whose ``forward`` takes and returns only tensors. It uses as many threads as
torch does in the process that makes it.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from the_mask.inference.runtimes.cache import weights_of
from the_mask.inference.runtimes.fusion import fuse_norms

Arguments = Sequence[Tensor]
NEEDS = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}


class Session(Protocol):
    """A network that is ready to run."""

    def __call__(self, arguments: Arguments) -> list[Tensor]:
        """Results for some arguments of the layout that the session was made for."""


class EagerSession:
    """PyTorch itself, with frozen norms folded into convolutions.

    Args:
        channels_last: memory layout of images and convolution weights.
        dtype: dtype of autocast; None runs without autocast.
    """

    def __init__(
        self, module: nn.Module, example: Arguments, channels_last: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        self.module = fuse_norms(copy.deepcopy(module).eval(), example)
        # Tensor.contiguous refuses preserve_format for views such as a transposed map.
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last:
            self.module = self.module.to(memory_format=torch.channels_last)
        self.dtype = dtype
        self.run: Callable[..., Sequence[Tensor]] = self.module

    def __call__(self, arguments: Arguments) -> list[Tensor]:
        images = [x.contiguous(memory_format=self.layout) if _is_image(x) else x for x in arguments]
        with torch.no_grad(), torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            results = self.run(*images)
        return [x.float() if x.dtype == self.dtype else x for x in results]


class CompiledSession(EagerSession):
    """``torch.compile`` with constants folded; the first call compiles."""

    def __init__(self, module: nn.Module, example: Arguments, **options: Any) -> None:
        super().__init__(module, example, **options)
        self.run = torch.compile(self.module, dynamic=False, options={"freezing": True})


class OnnxRuntimeSession:
    """ONNX Runtime on the CPU."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Threads that spin between frames would take the cores from decoding and drawing.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [x.name for x in self.session.get_inputs()]

    def __call__(self, arguments: Arguments) -> list[Tensor]:
        feed = {name: _array(x) for name, x in zip(self.names, arguments, strict=True)}
        return [torch.from_numpy(x) for x in self.session.run(None, feed)]


@functools.cache
def openvino_core() -> Any:
    """The one ``openvino.Core`` of the process, which is never released.

    Each core replaces the stack for signals of its thread, and gives back the earlier one when it is released. Of two
    that overlap (seen with OpenVINO 2026.4), the second gives back the first one's, which is freed by then: the next
    signal, such as Ctrl-C or the end of a child process, ends the process.
    """
    import openvino

    return openvino.Core()


class OpenVinoSession:
    """OpenVINO on the CPU.

    Args:
        path: ONNX, or OpenVINO's format.
        precision: "float32" or "bfloat16", in which OpenVINO computes.
    """

    def __init__(self, path: Path, precision: str = "float32") -> None:
        import openvino

        types = {"float32": openvino.Type.f32, "bfloat16": openvino.Type.bf16}
        core = openvino_core()
        self.compiled = core.compile_model(
            core.read_model(str(path), *([str(weights_of(path))] if path.suffix == ".xml" else [])),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": types[precision],
            },
        )
        # A request holds the arrays of one call, so each thread has its own.
        self.local = threading.local()

    def __call__(self, arguments: Arguments) -> list[Tensor]:
        if not hasattr(self.local, "request"):
            self.local.request = self.compiled.create_infer_request()
        request = self.local.request
        request.infer([_array(x) for x in arguments], share_inputs=True)
        return [torch.from_numpy(request.get_output_tensor(i).data.copy()) for i in range(len(self.compiled.outputs))]


def missing(backend: str, precision: str = "float32") -> str:
    """What to install for a backend; "" if everything is installed."""
    needs = NEEDS.get(backend, ())
    extra = backend
    if precision == "int8" and backend == "openvino":
        needs, extra = (*needs, "onnxruntime", "nncf"), "int8"
    absent = [name for name in needs if importlib.util.find_spec(name) is None]
    return f"pip install 'the_mask[{extra}]' (missing: {', '.join(absent)})" if absent else ""


def _is_image(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_floating_point()


def _array(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().numpy()
