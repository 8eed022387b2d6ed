"""Score a model, or a folder of predicted label PNGs of any program.

  the-mask evaluate --config camvid/mask2former_r18_cpu MODEL.WEIGHTS output/camvid/model_final.pth
  the-mask evaluate --model street-mask
  the-mask evaluate --pred predictions --dataset camvid_val

Predictions are DIR/<video>/<frame>.png, one per frame, one channel, original frame size. Nothing is skipped: missing or
bad files are listed, and the exit status is 1. See docs/metrics.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from the_mask.cli import _options

EXPECTED = ("ModuleNotFoundError",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    what = parser.add_mutually_exclusive_group(required=True)
    _options.config_option(what, required=False, help="a model: its config, by path or name; scored on DATASETS.TEST")
    _options.model_option(what)
    what.add_argument("--pred", type=Path, metavar="DIR", help="folder of predictions")
    what.add_argument("--constant", action="store_true", help="the best constant prediction, as a baseline")
    model = parser.add_argument_group("of a model")
    _options.data_option(model)
    _options.weights_option(model)
    _options.process_options(model)
    _options.runtime_options(model)
    _options.trust_option(model)
    parser.add_argument("--report", type=Path, metavar="HTML", help="also write a report (see the-mask report)")
    folder = parser.add_argument_group("of a folder and of the baseline")
    folder.add_argument("--dataset", metavar="NAME", help="e.g. vspw_val, camvid_val, moving_shapes_val")
    _options.import_option(folder)
    values = folder.add_mutually_exclusive_group()
    values.add_argument("--raw", action="store_true", help="PNGs hold raw values, VSPW: 1..124 (default)")
    values.add_argument("--train-ids", action="store_true", help="PNGs hold train ids 0..K-1")
    folder.add_argument("--vc-windows", type=int, nargs="+", default=[8, 16], metavar="N", help="default: 8 16")
    folder.add_argument("--tc-weights", type=Path, metavar="PTH", help="torchvision RAFT weights; without them no TC")
    folder.add_argument("--tc-videos", type=int, default=0, metavar="N", help="TC over the first N videos; 0: all")
    folder.add_argument("--device", default="cpu", help="where the optical flow runs (default: cpu)")
    folder.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    _options.overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Score; figures go to the log and to ``--json``."""
    if args.config_file or args.model:
        model(args)
        return
    if args.data:
        raise ValueError(f"--data {args.data} goes with --config or --model; of a folder give --dataset and --import")
    if args.opts:
        raise ValueError(f"{' '.join(args.opts)}: config overrides go with --config or --model")
    if not args.dataset:
        raise ValueError("--dataset NAME is missing: which data set are these predictions of?")
    folder(args)


def model(args: argparse.Namespace) -> None:
    """Score a trained model, as ``the-mask train --eval-only`` does."""
    from the_mask.engine import RunOptions, run_processes

    if args.dataset or args.json:
        raise ValueError("--dataset and --json go with --pred; of a model, set DATASETS.TEST and read OUTPUT_DIR")
    overrides = _options.with_weights(args)
    if args.report:
        overrides += ["TEST.SAVE_REPORT", str(args.report)]
    runtime = {"backend": args.backend, "precision": args.precision, "calibrate": args.calibrate}
    options = RunOptions(
        args.config_file or "",
        overrides,
        eval_only=True,
        trust_pickle=args.trust_pickle,
        runtime=runtime,
        model=args.model,
        data=args.data,
    )
    run_processes(options, num_gpus=args.num_gpus, num_processes=args.num_processes)


def folder(args: argparse.Namespace) -> None:
    """Score label PNGs, or the best constant prediction."""
    from the_mask.data import import_dataset_modules
    from the_mask.data.files import check_writable, write_json
    from the_mask.engine.logs import setup_logging
    from the_mask.evaluation import constant_baseline, evaluate_predictions, raft_flow
    from the_mask.evaluation.html import ReportSink, write_report
    from the_mask.evaluation.report import summary_table

    setup_logging(None)
    for path in (args.report, args.json):
        if path is not None:
            check_writable(path)
    import_dataset_modules(args.modules)
    if args.report and args.constant:
        raise ValueError("--report shows predictions: give --pred or --config, not --constant")
    if args.report and args.report.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--report {args.report}: expected the name of an .html file")
    if args.constant:
        class_name, results = constant_baseline(args.dataset, args.vc_windows)
        print(f"{args.dataset}: every pixel predicted as {class_name}\n\n{summary_table(results['sem_seg'])}")
    else:
        sinks = [ReportSink(args.dataset, args.pred.name)] if args.report else []
        results = evaluate_predictions(
            args.pred,
            args.dataset,
            sinks=sinks,
            train_ids=args.train_ids,
            windows=args.vc_windows,
            flow=raft_flow(args.tc_weights, args.device) if args.tc_weights else None,
            tc_videos=args.tc_videos,
        )
        for sink in sinks:
            print(f"report: {write_report(args.report, [sink.report(results['sem_seg'])])}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        # NaN is not JSON.
        write_json(args.json, {name: None if value != value else value for name, value in results["sem_seg"].items()})
