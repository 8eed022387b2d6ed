"""Choose the runtime for the parts of a model: by name, or the fastest one, measured on the first frame."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from the_mask.export.package import write_onnx
from the_mask.export.programs import Program
from the_mask.inference.runtimes.cache import RuntimeCache, module_digest, text_digest
from the_mask.inference.runtimes.part import Flat, Part, eager_results, register
from the_mask.inference.runtimes.quantize import (
    RECIPE,
    Accuracy,
    Calls,
    Clips,
    check_clips,
    compare,
    labels_of,
    method,
    write_int8,
)
from the_mask.inference.runtimes.sessions import (
    CompiledSession,
    EagerSession,
    OnnxRuntimeSession,
    OpenVinoSession,
    Session,
    missing,
)
from the_mask.modeling.propagation.propagators import Propagated
from the_mask.modeling.segmentor import Segmentor

BACKENDS = ("auto", "eager", "compile", "onnxruntime", "openvino")
PRECISIONS = ("float32", "bfloat16", "int8")
# Allowed difference from PyTorch, relative to the largest value of a result. Of int8 only nonsense is refused here; the
# label maps tell what it costs.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "int8": 1.0}
# Share of the label maps that int8 must keep; below it, float32 runs.
LEAST_AGREEMENT = 0.9
INT8 = ", int8"
# Seconds for which "auto" measures each candidate of a part, after one warm-up call.
MEASURE_SECONDS = 0.5
_logger = logging.getLogger("the_mask.runtimes")


@dataclass
class RuntimeReport:
    """Which runtime runs which part.

    Attributes:
        chosen: runtime by part and layout.
        seconds: seconds per call of each candidate, by part and layout, where candidates were measured.
        left_out: reason why a candidate was not tried, by candidate.
        accuracy: of int8, against float32.
        classes: their names, where they are known.
    """

    chosen: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    accuracy: Accuracy | None = None
    classes: Sequence[str] = ()

    def __str__(self) -> str:
        lines = []
        for part, name in self.chosen.items():
            others = ", ".join(f"{key} {1e3 * value:.1f} ms" for key, value in self.seconds.get(part, {}).items())
            lines.append(f"{part}: {name}" + (f" ({others})" if others else ""))
        lines += [f"without {name}: {reason}" for name, reason in self.left_out.items()]
        if self.accuracy is not None:
            lines.append(self.accuracy.text(self.classes))
        return "\n".join(lines)


def use_runtime(
    model: Segmentor,
    backend: str = "auto",
    precision: str = "float32",
    cache: RuntimeCache | None = None,
    calibration: Clips | None = None,
) -> RuntimeReport:
    """Run a segmentor's networks in a runtime. Changes the model in place; for inference only.

    Sessions are made when a size is first seen, and compared with PyTorch once, on their first arguments.

    Args:
        model: a segmentor on the CPU. A second call replaces the earlier choice.
        backend: one of :data:`BACKENDS`. "auto" measures the installed ones (without "compile", which takes minutes) on
            the first call of every part, and takes the fastest one for each.
        precision: "float32"; "bfloat16" (eager, compile and OpenVINO; the processor should know it); or "int8" (ONNX
            Runtime and OpenVINO), which serves the parts and frame sizes that were calibrated where it is measured
            to be faster, and float32 the others.
        cache: folder for exported graphs; None takes the user's cache folder.
        calibration: for int8, clips of frames [3, h, w] like those to come; see :func:`calibration_clips`.

    Returns:
        A report, which is filled as sessions are made; for int8 it has the accuracy on the calibration frames.

    Raises:
        ValueError: unknown backend or precision, an unsupported combination, a model on another device, a model
            without parts for runtimes ("auto" then uses PyTorch and says so), or int8 without calibration frames.
        ModuleNotFoundError: the backend's package is not installed; the message has the command.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if precision == "bfloat16" and backend == "onnxruntime":
        raise ValueError("ONNX Runtime has no bfloat16 on the CPU: use backend openvino, compile or eager")
    if precision == "int8":
        if backend not in ("auto", "onnxruntime", "openvino"):
            raise ValueError(
                f"PyTorch does not run these networks in int8: not backend {backend}, but onnxruntime, openvino or auto"
            )
        calibration = check_clips(calibration)
    reason = missing("onnxruntime" if backend == "auto" and precision == "int8" else backend, precision)
    if reason:
        raise ModuleNotFoundError(f"backend {backend} in {precision}: {reason}")
    device = next(model.parameters()).device
    if device.type != "cpu" and (backend != "auto" or precision != "float32"):
        raise ValueError(
            f"backend {backend} in {precision} is for the CPU; the model is on {device} (MODEL.DEVICE cpu)"
        )
    register(Propagated)
    report = RuntimeReport()
    chooser = _Chooser(backend, precision, cache or RuntimeCache(), report)
    model.eval()
    names = model.runtime_parts()
    if not names:
        reason = f"{type(model).__name__} does not say which of its parts other runtimes can run"
        if backend != "auto":
            raise ValueError(f"backend {backend}: {reason}")
        report.left_out["everything but PyTorch"] = reason
        _logger.warning("%s; PyTorch runs it", reason)
    parts: list[Part] = []
    for owner, name in names:
        module, function = _method(owner, name)
        earlier = vars(module).get(function)
        if isinstance(earlier, Part):
            earlier.remove()
        if device.type == "cpu":
            parts.append(Part(name, module, function, chooser.open))
    if precision == "int8" and parts:
        assert calibration is not None
        _calibrate(model, parts, chooser, calibration)
    return report


def _calibrate(model: Segmentor, parts: Sequence[Part], chooser: _Chooser, clips: Clips) -> None:
    """Collect what the parts are called with, make the sessions of int8, and see what they do to the label maps."""
    report = chooser.report
    chooser.recording = True
    expected = labels_of(model, clips)
    chooser.recording = False
    _forget(parts)
    found = labels_of(model, clips)
    for calls in chooser.calls.values():
        calls.release()
    chosen = [label for label, name in report.chosen.items() if name.endswith(INT8)]
    if not chosen:
        report.left_out["int8"] = "float32 is as fast on this processor"
        _logger.warning("int8 is not faster than float32 on this processor, so float32 runs")
        return
    report.accuracy = compare(found, expected, model.num_classes)
    if report.accuracy.agreement >= LEAST_AGREEMENT:
        _logger.info("%s", report.accuracy.text())
        return
    report.left_out["int8"] = (
        f"only {100 * report.accuracy.agreement:.1f} % of the calibration frames' cells keep their label (at least "
        f"{100 * LEAST_AGREEMENT:g} % are wanted)"
    )
    _logger.warning("int8: %s; float32 runs", report.left_out["int8"])
    chooser.calls.clear()
    report.chosen.clear()
    _forget(parts)


def _forget(parts: Sequence[Part]) -> None:
    for part in parts:
        part.forget()


def _method(owner: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Module and method of a part, which is named by a submodule (its ``forward`` then) or by a method."""
    found = getattr(owner, name)
    return (found, "forward") if isinstance(found, nn.Module) else (owner, name)


class _Chooser:
    """Makes the sessions of a part, one per layout."""

    def __init__(self, backend: str, precision: str, cache: RuntimeCache, report: RuntimeReport) -> None:
        self.backend, self.precision, self.cache, self.report = backend, precision, cache, report
        # For int8: what every layout, by its digest, was called with; filled while recording.
        self.recording = False
        self.calls: dict[str, Calls] = {}

    def open(self, part: Part, flat: Flat, tensors: list[Tensor]) -> Session:
        """Make the session that runs a layout from now on."""
        expected = eager_results(flat, tensors)
        shapes = " ".join("x".join(map(str, x.shape)) for x in tensors if x.dim() > 1)
        label = f"{part.name} {shapes}"
        part.digest = part.digest or module_digest(part.module)
        digest = text_digest(part.digest, part.function, flat.spec, flat.constants, *map(_layout, tensors))

        if self.recording:
            return self.calls.setdefault(digest, Calls(flat))

        def graph() -> Any:
            return self.cache.graph(digest, lambda path: _write(flat, tensors, path))

        makers = self._makers(flat, tensors, graph)
        calls = self.calls.get(digest)
        if calls is not None:
            digest = text_digest(digest, calls.digest, RECIPE)
            makers |= self._int8_makers(list(makers), digest, graph, calls)
        elif self.precision == "int8" and "int8" not in self.report.left_out:
            self.report.left_out[f"int8 for {label}"] = "its frame size was not calibrated"
            _logger.warning("int8 was not calibrated for %s: float32 runs there", label)
        if len(makers) == 1:
            name = next(iter(makers))
            session = makers[name]()
            _check(session, tensors, expected, f"{label} in {name}", _precision(name, self.precision))
            self.report.chosen[label] = name
            return session
        return self._fastest(label, digest, makers, tensors, expected)

    def _makers(self, flat: Flat, tensors: list[Tensor], graph: Callable[[], Any]) -> dict[str, Callable[[], Session]]:
        dtype = torch.bfloat16 if self.precision == "bfloat16" else None
        every: dict[str, Callable[[], Session]] = {
            "eager": lambda: EagerSession(flat, tensors, dtype=dtype),
            "eager, channels last": lambda: EagerSession(flat, tensors, channels_last=True, dtype=dtype),
            "compile": lambda: CompiledSession(flat, tensors, channels_last=True, dtype=dtype),
            "onnxruntime": lambda: OnnxRuntimeSession(graph()),
            "openvino": lambda: OpenVinoSession(graph(), "float32" if dtype is None else self.precision),
        }
        if self.backend != "auto":
            return {self.backend: every[self.backend]}
        del every["compile"]
        if dtype is not None:
            del every["onnxruntime"]
        for name in ("onnxruntime", "openvino"):
            reason = missing(name)
            if name in every and reason:
                self.report.left_out[name] = reason
                del every[name]
        return every

    def _int8_makers(
        self, names: Sequence[str], digest: str, graph: Callable[[], Any], calls: Calls
    ) -> dict[str, Callable[[], Session]]:
        def quantised(name: str) -> Any:
            own = text_digest(digest, name, method(name))
            suffix = ".xml" if name == "openvino" else ".onnx"
            return self.cache.graph(own, lambda path: write_int8(graph(), calls.kept, path, name), suffix)

        every: dict[str, Callable[[], Session]] = {
            "onnxruntime": lambda: OnnxRuntimeSession(quantised("onnxruntime")),
            "openvino": lambda: OpenVinoSession(quantised("openvino")),
        }
        for name in every:
            reason = missing(name, "int8") if name in names else ""
            if reason:
                self.report.left_out[name + INT8] = reason
        return {
            name + INT8: make
            for name, make in every.items()
            if name in names and name + INT8 not in self.report.left_out
        }

    def _fastest(
        self,
        label: str,
        digest: str,
        makers: dict[str, Callable[[], Session]],
        tensors: list[Tensor],
        expected: list[Tensor],
    ) -> Session:
        key = text_digest(digest, self.precision, torch.get_num_threads(), sorted(makers), _processor())
        kept = self.cache.choice(key)
        sessions: dict[str, Session] = {}
        for name in sorted(makers, key=lambda name: name != kept):  # the one that is kept first
            session = self._tried(label, name, makers[name], tensors, expected)
            if session is None:
                continue
            if name == kept:
                self.report.chosen[label] = name
                return session
            sessions[name] = session
        if not sessions:
            raise RuntimeError(f"nothing can run {label}: {self.report}")
        seconds = {name: _measure(session, tensors) for name, session in sessions.items()}
        best = min(seconds, key=seconds.__getitem__)
        self.report.chosen[label], self.report.seconds[label] = best, seconds
        self.cache.keep_choice(key, best, {"part": label, "seconds": seconds})
        _logger.info("%s", RuntimeReport({label: best}, {label: seconds}))
        return sessions[best]

    def _tried(
        self, label: str, name: str, make: Callable[[], Session], tensors: list[Tensor], expected: list[Tensor]
    ) -> Session | None:
        """A session that gives PyTorch's results, or None, with the reason in the report."""
        try:
            session = make()
            _check(session, tensors, expected, f"{label} in {name}", _precision(name, self.precision))
        # An exporter may fail in any way on an unknown network; "auto" then leaves it out and says so.
        except Exception as error:  # noqa: BLE001
            text = str(error).strip().splitlines()
            self.report.left_out[f"{name} for {label}"] = f"{type(error).__name__}: {text[0] if text else ''}"
            _logger.warning("%s cannot run %s (%s)", name, label, text[0] if text else type(error).__name__)
            return None
        return session


def _write(flat: Flat, tensors: list[Tensor], path: Any) -> None:
    results = eager_results(flat, tensors)
    program = Program(
        path.stem,
        flat,
        tuple(tensors),
        [f"input{i}" for i in range(len(tensors))],
        [f"output{i}" for i in range(len(results))],
    )
    write_onnx(program, path.parent)


def _layout(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)}"


def _check(session: Session, tensors: Sequence[Tensor], expected: Sequence[Tensor], name: str, precision: str) -> None:
    found = session(list(tensors))
    for right, other in zip(expected, found, strict=True):
        if right.shape != other.shape:
            raise RuntimeError(f"{name} gives shape {list(other.shape)}, PyTorch {list(right.shape)}")
        difference = float((right.float() - other.float()).abs().max()) / (float(right.float().abs().max()) or 1.0)
        if not difference <= TOLERANCE[precision]:
            raise RuntimeError(
                f"{name} differs from PyTorch by {difference:.2g} of the largest value (allowed: "
                f"{TOLERANCE[precision]:g})"
            )


def _measure(session: Session, tensors: list[Tensor]) -> float:
    """Median seconds of a call."""
    session(tensors)
    times: list[float] = []
    while sum(times) < MEASURE_SECONDS or len(times) < 2:
        start = time.perf_counter()
        session(tensors)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _precision(name: str, wanted: str) -> str:
    """In which precision a candidate computes."""
    return "int8" if name.endswith(INT8) else "float32" if wanted == "int8" else wanted


def _processor() -> str:
    return torch.backends.cpu.get_cpu_capability()
