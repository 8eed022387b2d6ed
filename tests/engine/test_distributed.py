"""Several processes on the CPU (gloo) against one."""

import atexit
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm
from engine_fakes import assert_same, debug_cfg, fake_cfg, train_both
from tolerances import approx, is_close

from the_mask.engine import Trainer, launch
from the_mask.engine.launch import plain_message, under_torchrun
from the_mask.ops.threads import threads_per_process
from the_mask.weights import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def train_both_and_note_threads(cfg, root, fake):
    """In each process: train, and write down at exit the names of the threads that still run."""
    train_both(cfg, root, fake)
    file = Path(cfg.OUTPUT_DIR) / f"threads{comm.get_rank()}.txt"
    tasks = Path("/proc/self/task")
    atexit.register(lambda: file.write_text("".join((task / "comm").read_text() for task in tasks.iterdir())))


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=rf"--dist-url {address}: port .* cannot be used .*in use.*; name another"):
            launch(print, num_processes=2, dist_url=address)


def test_two_processes_equal_one(tiny_shapes: Path, tmp_path: Path) -> None:
    """Group norm and per-clip random points make the batch's split invisible; normalisers are shared over ranks."""
    overrides = ["SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.CHECKPOINT_PERIOD", 0, "TEST.EVAL_PERIOD", 2]
    # What rounding may decide is left out: AdamW's first steps divide by the gradient's own size, and the choice of
    # uncertain points is a threshold.
    overrides += ["SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 0.1, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1.0]
    overrides += ["MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO", 0.0]
    fake = ["SOLVER.IMS_PER_BATCH", 8, "SOLVER.ACCUM_STEPS", 2, "SOLVER.EMA.ENABLED", True]
    one, two = tmp_path / "one", tmp_path / "two"
    in_two = lambda *args: launch(train_both_and_note_threads, args, num_processes=2)  # noqa: E731
    for folder, start in ((one, train_both), (two, in_two)):
        (folder / "fake").mkdir(parents=True)
        start(debug_cfg(folder, *overrides), str(tiny_shapes), fake_cfg(folder / "fake", *fake))
    for rank in (0, 1) if sys.platform == "linux" else ():
        # A thread of gloo at exit would abort the process now and then.
        assert "gloo" not in (two / f"threads{rank}.txt").read_text()
    alone = torch.load(one / "rank0.pth", weights_only=True)
    ranks = [torch.load(two / f"rank{rank}.pth", weights_only=True) for rank in (0, 1)]
    assert_same(ranks[0]["model"], ranks[1]["model"])
    assert ranks[0]["losses"] == approx(alone["losses"], "formula")
    start = Trainer(debug_cfg(tmp_path, *overrides)).model.state_dict()
    for name, value in alone["model"].items():
        moved = (value.double() - start[name].double()).abs().max().item()
        error = (value.double() - ranks[0]["model"][name].double()).abs().max().item()
        assert error <= 2e-7 + 1e-4 * moved, (name, error, moved)
    assert ranks[0]["results"]["mIoU"] == pytest.approx(alone["results"]["mIoU"], abs=0.5)
    state = read_checkpoint(two / "model_final.pth")
    assert len(state["rng"]) == 2
    assert (two / "metrics.json").exists()

    # A loss that is NaN on one rank stops both, and both know whose files they were.
    for rank in (0, 1):
        text = (two / f"error{rank}.txt").read_text()
        assert "iteration 1" in text
        assert "rank 0: video/004.jpg, video/005.jpg" in text
        assert "rank 1: video/006.jpg, video/007.jpg" in text

    # The fake model in the same processes: accumulation over processes, averaged weights.
    for kind in ("model", "ema"):
        ours, theirs = (read_checkpoint(folder / "fake" / "model_final.pth")[kind] for folder in (one, two))
        ours, theirs = ours.get("average", ours), theirs.get("average", theirs)
        for name, value in ours.items():
            if name != "count":
                assert is_close(value, theirs[name], "sum"), (kind, name)


def test_errors_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        launch(print, num_gpus=2, num_processes=2)
    with pytest.raises(ValueError, match="--num-gpus 99: this machine has"):
        launch(print, num_gpus=99)
    with pytest.raises(ValueError, match="need --dist-url"):
        launch(print, num_processes=2, num_machines=2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="RANK, WORLD_SIZE"):
        launch(print)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    assert under_torchrun()
    with pytest.raises(ValueError, match="torchrun already decides"):
        launch(print, num_processes=2)


def test_message_of_a_data_worker() -> None:
    text = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    text += '  File "x.py", line 1, in f\nValueError: a/b.jpg: image file is truncated: 12 bytes\n'
    assert plain_message(ValueError(text)) == "a/b.jpg: image file is truncated: 12 bytes"
    assert plain_message(ValueError("plain: text")) == "plain: text"


def test_one_process_runs_in_place(capsys: pytest.CaptureFixture[str]) -> None:
    launch(print, ("here",), num_processes=1)
    assert capsys.readouterr().out == "here\n"


def test_threads_are_shared_out() -> None:
    cores = threads_per_process(1)
    assert 1 <= cores <= (os.cpu_count() or 1)
    assert threads_per_process(10 * cores) == 1


def test_torchrun_and_sigterm(tiny_shapes: Path, tmp_path: Path) -> None:
    """torchrun trains on two processes; SIGTERM to it leaves a checkpoint that one process resumes."""
    output = tmp_path / "out"
    cfg = debug_cfg(output)
    overrides = ["OUTPUT_DIR", str(output), "MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "100000"]
    overrides += ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", str(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["tools/train_net.py", "--config-file", "configs/debug/mask2former_debug.yaml", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "iter 2/" in line:
                process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert process.returncode != 0
    state = read_checkpoint(output / (output / "last_checkpoint").read_text())
    assert state["iteration"] >= 1, "".join(lines)
    assert len(state["rng"]) == 2
    trainer = Trainer(debug_cfg(output, "SOLVER.MAX_ITER", 100000))
    trainer.resume_or_load(True)
    assert trainer.completed == state["iteration"] + 1
