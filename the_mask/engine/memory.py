"""Memory of large tensors on a CPU: kept by the process instead of being fetched page by page for every layer."""

from __future__ import annotations

import ctypes
import os
import platform

# Numbers of mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD = 64 << 20
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc to reuse what was freed; by default it gives large blocks back at once.

    A layer of a large image writes to megabytes of fresh memory, and each of their pages costs a fault: half of the
    time of a training step of a mobile network. The price is that the process stays as large as it ever was.

    Returns:
        Whether it was done: not without glibc, and not where ``MALLOC_*`` or ``GLIBC_TUNABLES`` already say something.
    """
    decided = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if decided or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, LARGEST), (M_TOP_PAD, TOP_PAD))
    return all(mallopt(name, value) == 1 for name, value in settings)
