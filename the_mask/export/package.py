"""Writes programs to files, runs them, and compares them with the original model."""

from __future__ import annotations

import importlib.util
import io
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import the_mask
from the_mask.data.files import (
    TEMPORARY,
    atomic_write,
    file_digest,
    remove_leftovers,
    sync_file,
    sync_folder,
    write_json,
)
from the_mask.export.programs import Program, example_frame, exportable, image_program, stream_programs
from the_mask.export.reading import MANIFEST, check_digests, open_torch
from the_mask.modeling.stream import STATE_VERSION

EXPORT_FORMATS = ("torch", "onnx")
KINDS = ("image", "stream")
# The first opset whose GridSample has the modes of torch.
OPSET = 20
# Suffix of the weights file of a large ONNX program.
WEIGHTS = ".data"
# Dynamic sizes are at most this many times ``multiple``.
MOST_MULTIPLES = 128


def to_exported(program: Program) -> torch.export.ExportedProgram:
    """Export a program with ``torch.export``, in standard operators."""
    shapes: Any = None
    if program.dynamic:
        sides = {axis: program.multiple * torch.export.Dim(name, min=1, max=MOST_MULTIPLES) for axis, name in _SIDES}
        shapes = (sides,)
    with exportable():
        return torch.export.export(program.module, program.arguments, dynamic_shapes=shapes, strict=False)


_SIDES = ((1, "height"), (2, "width"))


def write_torch(program: Program, folder: Path) -> Path:
    """Write ``<name>.pt2``; ``torch.export.load(path).module()(*arguments)`` runs it."""
    path = folder / f"{program.name}.pt2"
    # In memory first: where writing fails, torch's archive writer ends the whole process.
    buffer = io.BytesIO()
    torch.export.save(to_exported(program), buffer)
    atomic_write(path, lambda stream: stream.write(buffer.getbuffer()))
    return path


def write_onnx(program: Program, folder: Path) -> Path:
    """Write ``<name>.onnx``, with standard operators only.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is not installed.
        ValueError: an operator outside the standard.
    """
    import onnx

    path = folder / f"{program.name}.onnx"
    exported = to_exported(program)
    with exportable(), warnings.catch_warnings():
        # torch's exporter uses features that torch has deprecated.
        warnings.simplefilter("ignore")
        converted = torch.onnx.export(
            exported,
            program.arguments,
            dynamo=True,
            opset_version=OPSET,
            input_names=program.inputs,
            output_names=program.outputs,
            verbose=False,
        )
    assert converted is not None
    # A large model has a separate weights file; both are renamed when they are complete.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=TEMPORARY) as place:
        converted.save(Path(place, path.name))
        foreign = foreign_operators(onnx.load(Path(place, path.name), load_external_data=False))
        if foreign:
            raise ValueError(f"{path} uses operators outside the ONNX standard: {', '.join(foreign)}")
        # The weights first, because the program needs them.
        for file in sorted(Path(place).iterdir(), key=lambda file: file.name == path.name):
            sync_file(file)
            file.replace(folder / file.name)
    sync_folder(folder)
    return path


def foreign_operators(model: Any) -> list[str]:
    """Operators of an ONNX model that are not in the standard's own domain."""
    graphs = [model.graph, *model.functions]
    return sorted({f"{n.domain}::{n.op_type}" for g in graphs for n in _nodes(g) if n.domain not in ("", "ai.onnx")})


def _nodes(graph: Any) -> list[Any]:
    """Nodes of a graph and of its nested graphs (branches, loops)."""
    nodes = list(graph.node)
    inner = [a.g for node in nodes for a in node.attribute if a.HasField("g")]
    return nodes + [node for graph in inner for node in _nodes(graph)]


class TorchSession:
    """Runs a ``.pt2`` file; see :func:`the_mask.export.reading.open_torch`."""

    def __init__(self, path: Path, trust: bool = False) -> None:
        self.module = open_torch(path, trust)

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return list(self.module(*arguments))


class OnnxSession:
    """Runs an ``.onnx`` file in ONNX Runtime, on the CPU, with as many threads as torch.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an ``export.json`` next to it has another digest.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        check_digests(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [x.name for x in self.session.get_inputs()]

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        feed = {name: x.numpy() for name, x in zip(self.names, arguments, strict=True)}
        return [torch.from_numpy(x) for x in self.session.run(None, feed)]


SESSIONS: dict[str, Any] = {"torch": TorchSession, "onnx": OnnxSession}
WRITERS = {"torch": write_torch, "onnx": write_onnx}


def export_package(
    model: Any,
    folder: str | Path,
    size: tuple[int, int],
    *,
    kinds: Sequence[str] = KINDS,
    formats: Sequence[str] = EXPORT_FORMATS,
    output: str = "scores",
    dynamic: bool = False,
    classes: Sequence[str] = (),
    tolerance: float = 1e-3,
    frames: int = 3,
) -> dict[str, Any]:
    """Export a segmentor, compare every file with it, and write ``export.json`` to the same folder.

    Args:
        model: a segmentor in eval mode on the CPU.
        folder: created if needed; files of an earlier export are replaced.
        size: (H, W) of the frames the model sees (the network size, see ``StreamingSegmentor.network_size``).
        kinds: "image" for single frames, "stream" for steps with explicit state.
        formats: "torch" (``.pt2``) and "onnx".
        output: "scores" or "labels".
        dynamic: allow dynamic sizes in the image program; a stream's size is fixed.
        classes: class names for the manifest.
        tolerance: largest allowed difference, relative to the largest value of a result.
        frames: number of frames of the check.

    Returns:
        The content of ``export.json``: programs with files, inputs, outputs and the results of the check.

    Raises:
        ValueError: unknown kind or format; see :func:`image_program` and :func:`stream_programs`.
        ModuleNotFoundError: the format is ONNX, which is not installed.
        RuntimeError: the results of a written program differ from the model's.
    """
    for given, known in ((kinds, KINDS), (formats, EXPORT_FORMATS)):
        strange = [x for x in given if x not in known]
        if strange or not given:
            raise ValueError(f"{', '.join(strange) or 'nothing'} to export: expected some of {', '.join(known)}")
    if "onnx" in formats:
        _require_onnx()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    programs = [image_program(model, size, output, dynamic)] if "image" in kinds else []
    programs += stream_programs(model, size, output) if "stream" in kinds else []
    calls = example_calls(programs, size, frames)
    manifest: dict[str, Any] = {
        "the_mask": the_mask.__version__,
        "torch": torch.__version__,
        # Version of the states whose tensors are inputs and outputs of stream programs.
        "state_version": STATE_VERSION,
        "model": type(model).__name__,
        "size": list(size),
        "size_multiple": model.size_divisibility,
        "score_stride": model.score_stride,
        "frame": "float32 [3, H, W], RGB, 0..255",
        "classes": list(classes) or [f"class {i}" for i in range(model.num_classes)],
        "programs": {},
    }
    with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=TEMPORARY) as name:
        place = Path(name)
        for program in programs:
            manifest["programs"][program.name] = _written(
                program, place, folder, formats, calls[program.name], tolerance
            )
        _publish(place, folder, manifest)
    return manifest


def _publish(place: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Move the files of ``place`` to their folder. At every moment a program there is whole, refused, or absent."""
    made = {file.name: file for file in place.iterdir()}
    for file in made.values():
        sync_file(file)
    # The manifest first: from here on the files of an earlier export are refused.
    write_json(folder / MANIFEST, manifest)
    for name in sorted(made, key=lambda name: name.endswith(".onnx")):  # the weights before their program
        if f"{name}{WEIGHTS}" not in made:
            # An earlier export's, which would be taken for those of this program.
            (folder / f"{name}{WEIGHTS}").unlink(missing_ok=True)
        made[name].replace(folder / name)
    sync_folder(folder)


def _written(
    program: Program,
    place: Path,
    folder: Path,
    formats: Sequence[str],
    calls: Sequence[tuple[Tensor, ...]],
    tolerance: float,
) -> dict[str, Any]:
    """Write a program to ``place`` and compare it with its module; returns its entry in the manifest of ``folder``."""
    entry: dict[str, Any] = {
        "inputs": [_describe(n, x) for n, x in zip(program.inputs, program.arguments, strict=True)],
        "outputs": program.outputs,
        "sizes_may_vary": program.dynamic,
        "files": {},
    }
    for name in formats:
        path = WRITERS[name](program, place)
        found = differences(program, SESSIONS[name](path), calls)
        digests = {file.name: file_digest(file) for file in sorted(place.glob(f"{path.name}*"))}
        entry["files"][name] = {"file": path.name, "sha256": digests, **found}
        if not found["max_difference"] <= tolerance:
            raise RuntimeError(
                f"{folder / path.name} differs from the model by {found['max_difference']:.2g} of its largest value "
                f"(allowed: {tolerance:g}); {100 * found['same_labels']:.2f} % of the labels agree"
            )
    return entry


def example_calls(
    programs: Sequence[Program], size: tuple[int, int], frames: int
) -> dict[str, list[tuple[Tensor, ...]]]:
    """Arguments for some calls of every program: a moving picture, and states computed by the modules."""
    calls: dict[str, list[tuple[Tensor, ...]]] = {program.name: [] for program in programs}
    by_name = {program.name: program for program in programs}
    for program in programs:
        if len(program.inputs) == 1:
            sizes = [size] * frames
            if program.dynamic:
                sizes[-1] = (size[0] + program.multiple, size[1] + 2 * program.multiple)
            calls[program.name] = [(moving_frame(s, t),) for t, s in enumerate(sizes)]
    later = [program for program in programs if len(program.inputs) > 1]
    if later:
        with exportable():
            _, *state = by_name["start"].module(moving_frame(size, 0))
            for t in range(1, frames + 1):
                frame = moving_frame(size, t)
                for program in later:
                    calls[program.name].append((frame, *state))
                _, *state = by_name["step"].module(frame, *state)
    return calls


def moving_frame(size: tuple[int, int], number: int) -> Tensor:
    """Frame ``number`` of a picture that moves by two pixels per frame."""
    return torch.roll(example_frame(size), (number, 2 * number), (1, 2)).contiguous()


def differences(program: Program, session: Any, calls: Sequence[Sequence[Tensor]]) -> dict[str, float]:
    """Compare a written program with its module for some calls.

    Returns:
        ``max_difference``: largest absolute difference of a result, relative to its largest value (without label maps);
        ``same_labels``: smallest share of cells with the same best class.
    """
    largest, same = 0.0, 1.0
    for arguments in calls:
        with exportable():
            expected = program.module(*arguments)
        found = session(*arguments)
        for name, right, other in zip(program.outputs, expected, found, strict=True):
            if right.shape != other.shape:
                raise RuntimeError(f"{program.name}: {name} has shape {list(other.shape)}, not {list(right.shape)}")
            if name == "labels":
                same = min(same, float((right == other).float().mean()))
                continue
            scale = float(right.abs().max()) or 1.0
            largest = max(largest, float((right.float() - other.float()).abs().max()) / scale)
            if name == "scores":
                same = min(same, float((right.argmax(dim=0) == other.argmax(dim=0)).float().mean()))
    return {"max_difference": largest, "same_labels": same}


def _describe(name: str, tensor: Tensor) -> dict[str, Any]:
    return {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"ONNX export needs {', '.join(missing)}: pip install 'the_mask[export]' (or export the torch format only)"
        )
