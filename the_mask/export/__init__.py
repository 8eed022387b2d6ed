"""Programs that run without this library: ``torch.export`` and ONNX, for one image or one step of a stream."""

from the_mask.export.package import EXPORT_FORMATS, export_package
from the_mask.export.programs import ImageProgram, Program, image_program, stream_programs

__all__ = ["EXPORT_FORMATS", "ImageProgram", "Program", "export_package", "image_program", "stream_programs"]
