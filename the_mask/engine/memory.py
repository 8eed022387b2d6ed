"""Keeps freed memory in the process, because allocating large tensors again is slow on a CPU."""

from __future__ import annotations

import ctypes
import os
import platform

# Numbers of mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD = 64 << 20
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make glibc reuse freed memory; by default it returns large blocks to the system at once.

    Each layer on a large image writes to megabytes of newly mapped memory, and every page costs a page fault: half of
    the time of a mobile network's training step. The price is that the process keeps its peak size.

    Returns:
        Whether it was done: not without glibc, and not if ``MALLOC_*`` or ``GLIBC_TUNABLES`` are set.
    """
    decided = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if decided or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, LARGEST), (M_TOP_PAD, TOP_PAD))
    return all(mallopt(name, value) == 1 for name, value in settings)
