"""Files of checkpoints: written completely or not at all, and read with errors that name the file."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from worldloom.encoding import pack, unpack
from worldloom.locations import as_os_errors, read_bytes, write_bytes

ZLIB_MARK = b"x"  # first byte of data that zlib compressed; a msgpack mapping never starts with it
BLOCK_BYTES = 2**20


class CheckpointError(RuntimeError):
    """The error of a checkpoint that is missing, damaged or of another kind."""


def checksum(data: bytes) -> str:
    """Return the CRC-32 of data, in 8 hexadecimal digits. It finds every change of up to 32 bits in a row."""
    return f"{zlib.crc32(data):08x}"


def checksum_of(path: Path) -> str:
    """Return the checksum of a file, which is read in blocks. Raises OSError."""
    value = 0
    with as_os_errors(path), path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    write_bytes(path, text.encode())


def write_msgpack(path: Path, value: Any, compress: bool = False) -> str:
    """Write a file completely or not at all; return its checksum. compress: losslessly (zlib), which `read_msgpack`
    detects."""
    packed = zlib.compress(pack(value), level=1) if compress else pack(value)
    write_bytes(path, packed)
    return checksum(packed)


def read_msgpack(path: Path, expected: str | None = None) -> Any:
    """Read a file; expected: its checksum, None of files that were written without one.

    Raises CheckpointError, naming the file, if it is missing, cut short, changed or of another kind.
    """
    try:
        data = read_bytes(path)
        if expected not in (None, checksum(data)):
            raise ValueError(f"its checksum is {checksum(data)}, but {expected} when it was written")
        return unpack(zlib.decompress(data) if data[:1] == ZLIB_MARK else data)
    except (OSError, ValueError, zlib.error) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. Delete its checkpoint to use the one before it."
        ) from error
