"""Memory that an update on a CPU frees stays with the process, for the next update.

An update asks for hundreds of MiB and frees them. The C library (glibc) by itself returns large blocks to the system at
once, and the next update waits while the system maps and clears every page again: up to a fifth of its time.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # numbers of mallopt(3)
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")
TUNABLES = ("glibc.malloc.trim_threshold", "glibc.malloc.mmap_")  # the same in GLIBC_TUNABLES


@cache
def keep_freed_memory() -> bool:
    """Let the process keep the memory that it frees; return whether its C library does so.

    Nothing changes, and the answer is False, with another C library than glibc, or where the environment already says
    what glibc keeps (VARIABLES and TUNABLES).
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if any(name in os.environ for name in VARIABLES) or any(name in tunables for name in TUNABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS and Windows have none
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
