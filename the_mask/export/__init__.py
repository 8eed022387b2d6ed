"""Programs that run without this library: ``torch.export`` and ONNX, for one image or one step of a stream."""

from the_mask.export.package import EXPORT_FORMATS, export_package
from the_mask.export.programs import ImageProgram, Program, image_program, stream_programs
from the_mask.export.reading import UnsafePackageError, open_torch

__all__ = [
    "EXPORT_FORMATS",
    "ImageProgram",
    "Program",
    "UnsafePackageError",
    "export_package",
    "image_program",
    "open_torch",
    "stream_programs",
]
