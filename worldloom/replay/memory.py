"""Memory: what replay needs and what is available."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from worldloom.replay.chunk import row_bytes
from worldloom.types import ColumnSpec


def ring_bytes(capacity: int, specs: Mapping[str, ColumnSpec]) -> int:
    """Return the bytes of a full ring, its index included."""
    return capacity * (row_bytes(specs) + 8 + 8 + 8 + 8)  # next, origin, start, slot


def check_memory(capacity: int, specs: Mapping[str, ColumnSpec]) -> None:
    """Raise MemoryError if a ring of that capacity needs more than nine tenths of the free memory."""
    needed, free = ring_bytes(capacity, specs), available_memory()
    if needed > 0.9 * free:
        fits = int(0.9 * free * capacity / needed)
        raise MemoryError(
            f"replay.capacity={capacity:,} rows needs {needed / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB of memory "
            f"are free. Lower replay.capacity to at most {fits:,}."
        )


def available_memory() -> int:
    """Return the bytes that this process can use: the machine's free memory, or less if its control group has less."""
    free = _meminfo_available()
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, max(int(limit) - used, 0))


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # not Linux: all memory of the machine
