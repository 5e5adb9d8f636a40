"""Parquet files of recorded steps, as numpy arrays of an episode's rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.archive import UNREADABLE, explain
from worldloom.extras import how_to_install
from worldloom.replay.frames import decode_image
from worldloom.types import Array


class Table:
    """Columns of a Parquet file, or consecutive rows of them. Every column is read completely.

    Needs pyarrow, from worldloom[data]. Raises ValueError for a file that is no Parquet, is damaged or lacks a column.
    """

    def __init__(self, path: Path, names: Sequence[str], content: Any = None) -> None:
        self.path, self.names = path, names
        self._content = _read(path, names) if content is None else content

    def __len__(self) -> int:
        return int(self._content.num_rows)

    def part(self, first: int, count: int) -> Table:
        """Return rows first to first + count."""
        return Table(self.path, self.names, self._content.slice(first, count))

    def numbers(self, name: str, shape: tuple[int, ...] = ()) -> Array:
        """Return column `name` as [rows, *shape]. Raises ValueError if it has gaps, text, or arrays of other shapes."""
        import pyarrow as pa

        array = _joined(self._content.column(name))
        for size in shape:
            if not hasattr(array, "flatten") or not _is_list(array.type):
                break
            lengths = array.value_lengths().to_numpy(zero_copy_only=False)
            if array.null_count or (lengths != size).any():
                raise self.refusal(name, f"has rows of other lengths than {size} of shape {shape}")
            array = array.flatten()
        kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
        if array.null_count or not any(kind(array.type) for kind in kinds):
            raise self.refusal(name, f"has gaps or holds {array.type}, expected numbers of shape {shape} in every row")
        values: Array = array.to_numpy(zero_copy_only=False)
        if values.size != len(self) * int(np.prod(shape)):
            raise self.refusal(name, f"has {values.size} numbers in {len(self)} rows, expected shape {shape} in each")
        return values.reshape(len(self), *shape)

    def images(self, name: str, size: tuple[int, int], side: int | None) -> Array:
        """Return column `name` of encoded images as [rows, C, H, W] uint8; see `decode_image`.

        Raises ValueError for what is no image of this size.
        """
        images = []
        for row, value in enumerate(self._content.column(name).to_pylist()):
            encoded = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(encoded, bytes):
                raise self.refusal(name, f"has no bytes of an image in row {row}, expected an encoded image")
            try:
                images.append(decode_image(encoded, size, side))
            except ValueError as error:
                raise self.refusal(name, f"row {row} {error}") from error
        return np.stack(images)

    def refusal(self, name: str, problem: str) -> ValueError:
        """Return the error that says what is wrong with a column."""
        return ValueError(f"{self.path}: column {name} {problem}. Get the dataset anew.")


def _read(path: Path, names: Sequence[str]) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ImportError(f"{path} is a Parquet file, but {how_to_install('pyarrow')}") from None
    if not path.is_file():
        raise ValueError(f"{path} is missing, expected a Parquet file. Get the dataset anew.")
    try:
        with parquet.ParquetFile(path) as file:
            held = set(file.schema_arrow.names)
            content = file.read(columns=[name for name in names if name in held]) if held.issuperset(names) else None
    except UNREADABLE as error:  # pyarrow's own errors are among them
        raise ValueError(
            f"{path} is no Parquet file, or is damaged: {explain(error)}. Get the dataset anew."
        ) from error
    if content is None:
        raise ValueError(f"{path} lacks the columns {sorted(set(names) - held)}, expected {sorted(names)}.")
    return content


def _joined(column: Any) -> Any:
    """Return a chunked column as one array, without the name that an extension (such as Array2D) gives its storage."""
    array = column.combine_chunks()
    if hasattr(array, "chunks"):
        array = array.chunk(0)
    return getattr(array, "storage", array)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))
