"""Segment a video, a folder of frames or a camera.

  the-mask segment drive.mp4 -o out.mp4
  the-mask segment drive.mp4 -o out.mp4 -o labels/ -o shares.json --model street-live
  the-mask segment drive.mp4 --annotations cvat-masks for_cvat
  the-mask segment 0 -o camera.mp4 --config camvid/mask2former_r18_cpu --weights output/model_best.pth
  the-mask segment --manifest videos.jsonl --engine ray --workers 8 -o results/

An output that ends in .mp4, .mkv, .mov or .avi is the annotated video, one that ends in .json the share of each class
in each frame, and a folder gets one PNG of class ids per frame, and classes.json. --annotations writes files for
annotation tools, see docs/import.md. Stop a camera with Ctrl-C. --manifest segments many videos, and the same command
goes on after a stop (docs/archives.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from the_mask.cli import _archive, _model, _options, annotations_

if TYPE_CHECKING:
    from the_mask.data.exporters import Exporter
    from the_mask.inference.sinks import Sink

INPUT_HELP = "video, animation or picture, folder of frames, URL, or camera index (0, 1, ...)"
# ModuleNotFoundError: of a hub model, or Ray.
EXPECTED = ("FileExistsError", "ModuleNotFoundError")


def add_arguments(parser: argparse.ArgumentParser, as_tool: bool = False) -> None:
    """The command line; ``as_tool``: that of ``tools/demo.py``, with ``--input`` and a single output."""
    model = parser.add_mutually_exclusive_group(required=as_tool)
    _options.model_option(model)
    _options.config_option(model, required=False)
    _options.weights_option(parser)
    if as_tool:
        parser.add_argument("--input", dest="source", required=True, help=INPUT_HELP)
        parser.add_argument("--output", required=True, nargs=1, metavar="VIDEO", help=".mp4, .mkv, .mov or .avi")
    else:
        parser.add_argument("source", nargs="?", metavar="INPUT", help=INPUT_HELP)
        parser.add_argument(
            "-o",
            "--output",
            default=[],
            action="append",
            metavar="PATH",
            help=".mp4, .mkv, .mov, .avi, .json or a folder; may be repeated",
        )
        parser.add_argument(
            "--annotations",
            default=[],
            action="append",
            nargs=2,
            metavar=("FORMAT", "DIR"),
            help=f"{', '.join(annotations_.FORMATS)}; a new folder; may be repeated",
        )
        parser.add_argument("--palette", action="store_true", help="also store class colours in the label PNGs")
        parser.add_argument("--refresh", action="store_true", help="look for a newer state of a hub model")
        _archive.add_arguments(parser)
    parser.set_defaults(as_tool=as_tool)
    parser.add_argument("--contact-sheet", type=Path, metavar="PNG", help="a picture of about a dozen frames")
    parser.add_argument("--alpha", type=float, default=0.55, help="0: frame only, 1: colours only (default: 0.55)")
    parser.add_argument("--no-legend", action="store_true")
    parser.add_argument("--show-input", action="store_true", help="show the original frame next to the segmentation")
    parser.add_argument("--dataset", default="", metavar="NAME", help="class names and colours; default: the model's")
    parser.add_argument("--fps", type=float, help="frames per second; default: those of the input, 15 for a folder")
    parser.add_argument("--audio", choices=("copy", "drop"), default="copy", help="sound of the input (default: copy)")
    parser.add_argument("--max-frames", type=int, default=0, metavar="N", help="stop after N frames (0: all)")
    parser.add_argument("--asynchronous", action="store_true", help="compute keyframes in a background thread")
    _options.runtime_options(parser)
    _options.trust_option(parser)
    _options.overrides(parser)


def run(args: argparse.Namespace) -> int:
    """Segment, and print what was written; returns the exit code."""
    import logging

    from the_mask.engine.logs import setup_logging
    from the_mask.engine.memory import keep_freed_memory
    from the_mask.engine.signals import interrupted_by_signals
    from the_mask.inference import StreamingSegmentor
    from the_mask.inference.annotation_sink import AnnotationSink
    from the_mask.inference.demo import DemoStyle, check_outputs, run_demo
    from the_mask.inference.rendering.video_writer import VideoWriter, open_source
    from the_mask.inference.sinks import write_classes

    setup_logging(None)
    keep_freed_memory()
    style = DemoStyle(alpha=args.alpha, legend=not args.no_legend, show_input=args.show_input)
    if not 0 <= style.alpha <= 1:
        raise ValueError(f"--alpha {style.alpha}: expected 0 (frame only) to 1 (colours only)")
    if args.max_frames < 0:
        raise ValueError(f"--max-frames {args.max_frames}: expected 1 or more, or 0 for all")
    many = not args.as_tool and args.manifest is not None
    if many:
        _archive.check(args)
        if args.source is not None:  # the first word of an override
            args.opts, args.source = [args.source, *args.opts], None
    if not many and args.source is None:
        raise ValueError("INPUT is missing: a video, folder, URL or camera index, or --manifest for many videos")
    stray = next((word for word in args.opts[::2] if not word.isupper()), None)
    if stray is not None:
        what = "--manifest names the inputs" if many else "one INPUT at a time"
        raise ValueError(f"{stray}: {what}, outputs are given with -o, and config overrides as pairs of KEY and VALUE")
    cfg, palette = _model.model_and_palette(args)
    if many:
        return _archive.run(args, cfg, palette, args.model or args.config_file or _model.default_model())
    # Check the outputs before building the model.
    video, sinks = sort_outputs(args, palette)
    exporters = annotation_exporters(args, palette)
    if video is None and not sinks and not exporters:
        raise ValueError("no output: give -o, --annotations, or both")
    if video is not None:
        VideoWriter(video)
    problem = logging.getLogger("the_mask.cli.segment").warning
    with interrupted_by_signals(), open_source(args.source, args.fps, on_problem=problem) as source:
        check_outputs(source, palette, video, args.contact_sheet, style, sinks)
        sinks += [AnnotationSink(exporter, source) for exporter in exporters]
        segmentor = StreamingSegmentor(cfg, trust_pickle=args.trust_pickle)
        runtimes = _options.use_backend(args, segmentor, list(palette.names), source.size)
        report = run_demo(
            segmentor,
            source,
            palette,
            video,
            contact_sheet=args.contact_sheet,
            sinks=sinks,
            style=style,
            max_frames=args.max_frames,
            asynchronous=args.asynchronous,
            audio=args.audio,
        )
    write_classes(sinks, palette.names, palette.colors, palette.ignore_label)
    speed = report.frames / report.seconds if report.seconds else 0.0
    stopped = ", stopped by a signal" if report.interrupted else ""
    keys = f", {report.keyframes} of them keyframes," if report.keyframes else ""
    outputs = ", ".join([*args.output, *(str(path) for exporter in exporters for path in exporter.report.files)])
    print(f"{report.frames} frames{keys} in {report.seconds:.1f} s ({speed:.1f} frames/s){stopped}: {outputs}")
    if runtimes is not None:
        print(runtimes)
    if args.contact_sheet:
        print(f"contact sheet: {args.contact_sheet}")
    return 0


def sort_outputs(args: argparse.Namespace, palette: Any) -> tuple[Path | None, list[Sink]]:
    """The annotated video, and the other outputs on the command line.

    Raises:
        ValueError: two videos, a name of no known kind, or a folder that is not empty.
    """
    from the_mask.inference.demo import PICTURE_SUFFIXES
    from the_mask.inference.rendering.video_writer import VideoWriter
    from the_mask.inference.sinks import ClassShares, LabelFolder

    videos: list[Path] = []
    sinks: list[Sink] = []
    for given in args.output:
        path = Path(given)
        if args.as_tool:
            videos.append(path)
        elif path.suffix.lower() == ".json":
            facts = {"model": args.model or args.config_file or _model.default_model(), "input": args.source}
            sinks.append(ClassShares(path, list(palette.names), facts))
        elif given.endswith(("/", "\\")) or path.is_dir() or (not path.suffix and not path.is_file()):
            sinks.append(LabelFolder.of_video(path, len(palette.names), palette.colors if args.palette else None))
        else:
            if path.suffix.lower() not in VideoWriter.FORMATS:
                picture = "; --contact-sheet writes a picture" if path.suffix.lower() in PICTURE_SUFFIXES else ""
                raise ValueError(
                    f"output {given}: expected a name that ends in {', '.join(VideoWriter.FORMATS)} (a video), .json "
                    f"(shares of classes) or / (a folder of label maps){picture}"
                )
            videos.append(path)
    if len(videos) > 1:
        raise ValueError(f"outputs {', '.join(map(str, videos))}: one video at a time")
    return (videos[0] if videos else None), sinks


def annotation_exporters(args: argparse.Namespace, palette: Any) -> list[Exporter]:
    """What --annotations names.

    Raises:
        ValueError: an unknown format. FileExistsError: a folder that is not empty.
    """
    from the_mask.data.classes import ClassList
    from the_mask.data.exporters import FORMATS

    result: list[Exporter] = []
    for form, folder in getattr(args, "annotations", []):
        if form not in FORMATS:
            raise ValueError(f"--annotations {form}: expected one of {', '.join(FORMATS)}")
        if folder in (str(exporter.folder) for exporter in result):
            raise ValueError(f"--annotations {form} {folder}: another format goes there, too")
        count = len(palette.names)
        ignore = palette.ignore_label if palette.ignore_label >= count else 65535
        colors = tuple((int(r), int(g), int(b)) for r, g, b in palette.colors)
        classes = ClassList(tuple(palette.names), colors, tuple(range(count)), ignore)
        result.append(FORMATS[form](folder, classes, model=args.model or args.config_file or _model.default_model()))
    return result
