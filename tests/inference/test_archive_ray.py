"""Archives on a Ray cluster of two nodes, one of which, and an actor, are killed on the way."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from archive_cases import InlineWorkers, SlowWorker, make_archive, opened, records, setup_for

from the_mask.inference.archive import segment_archive
from the_mask.inference.archive.ray_cluster import RayWorkers
from the_mask.inference.archive.worker import output_digest

VIDEOS, FRAMES = 24, 3
pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(monkeypatch):
    pytest.importorskip("ray", reason="extra ray is not installed")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # The nodes' workers import the tests' own.
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path.rstrip(os.pathsep))
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    second = made.add_node(**node)
    made.wait_for_nodes()
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    yield made, second
    made.shutdown()


def workers_of(folder):
    """Process ids of the workers, in the order of the results."""
    lines = records(folder) if (folder / "results.jsonl").exists() else []
    return [int(line["worker"].rpartition(":")[2]) for line in lines]


def wait_for(condition, seconds=300):
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
    manifest = make_archive(tmp_path / "in", VIDEOS, FRAMES)
    folder, killed = tmp_path / "ray", []

    def kill():
        wait_for(lambda: len(set(workers_of(folder))) == 2)
        actor = workers_of(folder)[-1]
        os.kill(actor, signal.SIGKILL)
        killed.append(actor)
        # Its successor works too, so that each node has an actor: one core each.
        wait_for(lambda: len(set(workers_of(folder))) == 3)
        killed.append(len(workers_of(folder)))
        made.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    tasks, results = opened(folder, manifest)
    summary = segment_archive(tasks, results, RayWorkers(setup_for(folder), 2, worker=SlowWorker), progress=False)
    killer.join()
    assert (summary.done, summary.failed) == (VIDEOS, 0)
    assert killed[1] < VIDEOS - 2, "the node was killed when nearly everything was done"
    assert 1 <= sum(line["attempts"] - 1 for line in records(folder)) <= 2, "a video of the actor, one of the node"
    tasks, results = opened(folder, manifest)
    assert all(map(results.done, tasks))
    tasks, results = opened(tmp_path / "inline", manifest)
    segment_archive(tasks, results, InlineWorkers(setup_for(tmp_path / "inline")), progress=False)
    assert digests(folder) == digests(tmp_path / "inline")
    assert len(digests(folder)) == VIDEOS
