"""Archives on a Ray cluster of two nodes, one of which, and an actor, are killed on the way."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from archive_cases import make_archive, opened, records

from the_mask.config import load_config
from the_mask.inference.archive import WorkerSetup, make_workers, segment_archive
from the_mask.inference.archive.worker import output_digest
from the_mask.inference.demo import palette_from_config
from the_mask.inference.stream import build_random

CONFIG = "configs/debug/swiftnet_debug.yaml"
SIZES = ["INPUT.TEST.SHORT_EDGE", "96", "INPUT.TEST.LONG_EDGE", "128", "MODEL.DEVICE", "cpu"]
VIDEOS, FRAMES = 12, 8
pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(monkeypatch):
    pytest.importorskip("ray", reason="extra ray is not installed")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    nodes = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=nodes)
    second = made.add_node(**{key: value for key, value in nodes.items() if key != "include_dashboard"})
    made.wait_for_nodes()
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    yield made, second
    made.shutdown()


def wait_for(condition, seconds=240):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.1)


def digests(folder):
    found = {}
    for line in records(folder):
        name = Path(line["video"]).name
        assert name not in found, "two results of one video"
        assert (line["status"], line["frames"]) == ("done", FRAMES)
        assert line["sha256"] == {output: output_digest(folder / output) for output in line["output"]}
        found[name] = line["sha256"]
    assert not [path for path in folder.iterdir() if path.name.endswith(".writing")]
    return found


def test_an_actor_and_a_node_are_killed(tmp_path, cluster):
    made, second = cluster
    torch.manual_seed(0)
    cfg = load_config(CONFIG, SIZES)
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.save({"model": build_random(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    manifest = make_archive(tmp_path / "in", VIDEOS, FRAMES)
    palette = palette_from_config(cfg)

    def segment(engine, folder):
        tasks, results = opened(folder, manifest)
        setup = WorkerSetup(WorkerSetup.packed(cfg), palette, str(folder), "debug", threads=1)
        return segment_archive(tasks, results, make_workers(engine, setup, 2, "cpu"), progress=False)

    folder, killed = tmp_path / "ray", []

    def kill():
        def done(count):
            return (folder / "results.jsonl").exists() and len(records(folder)) >= count

        wait_for(lambda: done(3) and len({line["worker"] for line in records(folder)}) == 2)
        actor = int(records(folder)[-1]["worker"].rpartition(":")[2])
        os.kill(actor, signal.SIGKILL)
        killed.append(actor)
        wait_for(lambda: done(len(records(folder)) + 2))
        made.remove_node(second, allow_graceful=False)
        killed.append("node")
        killed.append(len(records(folder)))

    killer = threading.Thread(target=kill)
    killer.start()
    summary = segment("ray", folder)
    killer.join()
    assert killed[1] == "node"
    assert killed[2] < VIDEOS - 1, "the node was killed when nearly everything was done"
    assert (summary.done, summary.failed) == (VIDEOS, 0)
    assert max(line["attempts"] for line in records(folder)) > 1
    assert segment("ray", folder).before == VIDEOS
    segment("local", tmp_path / "local")
    assert digests(folder) == digests(tmp_path / "local")
    assert len(digests(folder)) == VIDEOS
