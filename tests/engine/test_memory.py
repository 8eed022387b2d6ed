"""Freed memory is reused: counted in page faults of a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from the_mask.engine.memory import keep_freed_memory
torch.set_num_threads(1)
done = keep_freed_memory() if sys.argv[1] == "keep" else None
def layer():
    return torch.ones(8 << 20) * 2
layer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    layer()
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(mode, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], env=clean | environment, check=True, capture_output=True, text=True
    )
    done, faults = result.stdout.split()
    return done, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_layers_reuse_the_memory_of_others():
    default, kept = run("default"), run("keep")
    assert kept[0] == "True"
    assert kept[1] < 0.5 * default[1]
    assert run("keep", MALLOC_ARENA_MAX="1")[0] == "False"
