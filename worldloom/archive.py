"""Zip files that may come from strangers, as torch.save and numpy.savez write them: entries are never compressed.

So no entry can claim more than the file holds, and what is read needs no memory of its own.
"""

from __future__ import annotations

import mmap
import os
import pickle
import struct
import tokenize
import zipfile
import zlib

UNREADABLE = (  # what readers of zip, pickle, npy and msgpack raise for bytes that no writer wrote
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    tokenize.TokenError,
    zlib.error,
    zipfile.BadZipFile,
)
LOCAL_HEADER = 30  # bytes before an entry's name; the last four are the lengths of the name and of the extra field


def read_entries(path: str | os.PathLike[str], verdict: str) -> dict[str, memoryview]:
    """Return the bytes of each entry, mapped from the file and right by their checksums.

    verdict: what the file is if it cannot be read, such as "no replay buffer". Raises ValueError that says so,
    FileNotFoundError if there is no file.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                _check_claims(entries, os.fstat(file.fileno()).st_size)
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"its entry {damaged!r} is damaged")
            held = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
            return {entry.filename: _content(held, entry) for entry in entries}
        except UNREADABLE as error:
            raise ValueError(f"{path} is {verdict}, or is damaged: {explain(error)}. Get it anew.") from error


def explain(error: Exception) -> str:
    """Return what an error of UNREADABLE says of a file."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    name = "" if isinstance(error, (ValueError, MemoryError, zipfile.BadZipFile)) else f"{type(error).__name__}: "
    return f"{name}{error}" or "it is damaged"


def _check_claims(entries: list[zipfile.ZipInfo], size: int) -> None:
    """Raise ValueError for entries that are compressed, encrypted, named twice, or larger together than the file."""
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            raise ValueError(f"its entry {entry.filename!r} is compressed or encrypted, expected plain bytes")
    if (claimed := sum(entry.file_size for entry in entries)) > size:
        raise ValueError(f"its entries claim {claimed:,} bytes, but the file has {size:,}")
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("two of its entries have one name")


def _content(held: memoryview, entry: zipfile.ZipInfo) -> memoryview:
    header = entry.header_offset + LOCAL_HEADER
    begin = header + sum(struct.unpack("<HH", held[header - 4 : header]))
    return held[begin : begin + entry.file_size]
