"""Files of checkpoints: written completely or not at all, and read with errors that name the file."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

from worldloom.encoding import pack, unpack

PARTIAL = ".partial"  # suffix of folders and files that are not complete
ZLIB_MARK = b"x"  # first byte of data that zlib compressed; a msgpack mapping never starts with it


class CheckpointError(RuntimeError):
    """The error of a checkpoint that is missing, damaged or of another kind."""


def write_msgpack(path: Path, value: Any, compress: bool = False) -> None:
    """Write a file completely or not at all. compress: losslessly (zlib); `read_msgpack` detects it."""
    partial = path.with_suffix(PARTIAL)
    packed = zlib.compress(pack(value), level=1) if compress else pack(value)
    try:
        with partial.open("wb") as file:
            file.write(packed)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read_msgpack(path: Path) -> Any:
    """Read a file. Raises CheckpointError, naming the file, if it is missing, cut short or of another kind."""
    try:
        data = path.read_bytes()
        return unpack(zlib.decompress(data) if data[:1] == ZLIB_MARK else data)
    except (OSError, ValueError, zlib.error) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. Delete its checkpoint to use the one before it."
        ) from error
