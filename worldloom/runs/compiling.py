"""The cache of torch.compile on disk, in which a process that is killed while it compiles leaves incomplete files."""

from __future__ import annotations

import struct
from pathlib import Path

HEADER = 64  # bytes of a 64-bit ELF header


def compiler_cache() -> Path:
    """Return the folder of torch.compile's cache: TORCHINDUCTOR_CACHE_DIR, or a folder of the user."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # takes a second to import

    return Path(cache_dir())


def drop_damaged_libraries(folder: Path) -> list[Path]:
    """Delete compiled libraries in `folder` that are incomplete, so that they are compiled again; return their paths.

    torch.compile writes them in place and does not check them: an incomplete one would end every later run that needs
    it.
    """
    damaged = [path for path in folder.rglob("*.so") if _is_cut_short(path)]
    for path in damaged:
        path.unlink(missing_ok=True)
    return damaged


def _is_cut_short(path: Path) -> bool:
    """Return True if a library is incomplete. Its header says where the section table, which is written last, ends."""
    try:
        with path.open("rb") as file:
            header = file.read(HEADER)
        if len(header) < HEADER or header[:5] != b"\x7fELF\x02":
            return len(header) < HEADER or not any(header)
        (table,) = struct.unpack_from("<Q", header, 40)
        entry_size, entries = struct.unpack_from("<HH", header, 58)
        return bool(path.stat().st_size < max(table, 1) + entry_size * entries)
    except OSError:
        return False  # deleted meanwhile, or not readable
