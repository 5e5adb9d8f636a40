"""The compiler's cache on disk, which a process that is killed while it compiles leaves half-written."""

from __future__ import annotations

import struct
from pathlib import Path

HEADER = 64  # bytes of a 64-bit ELF header


def compiler_cache() -> Path:
    """Where torch.compile keeps what it compiled: TORCHINDUCTOR_CACHE_DIR, or a folder of the user's."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # takes a second to import

    return Path(cache_dir())


def drop_damaged_libraries(folder: Path) -> list[Path]:
    """Delete compiled libraries in `folder` that were cut short, so that they are compiled again; return them.

    torch.compile writes them in place and takes whatever lies there: one that is cut short would end every later run
    that needs it.
    """
    damaged = [path for path in folder.rglob("*.so") if _is_cut_short(path)]
    for path in damaged:
        path.unlink(missing_ok=True)
    return damaged


def _is_cut_short(path: Path) -> bool:
    """A linker writes the table of sections last; the header says where it ends."""
    try:
        with path.open("rb") as file:
            header = file.read(HEADER)
        if len(header) < HEADER or header[:5] != b"\x7fELF\x02":
            return len(header) < HEADER or not any(header)
        (table,) = struct.unpack_from("<Q", header, 40)
        entry_size, entries = struct.unpack_from("<HH", header, 58)
        return bool(path.stat().st_size < max(table, 1) + entry_size * entries)
    except OSError:
        return False  # gone meanwhile, or not ours to read
