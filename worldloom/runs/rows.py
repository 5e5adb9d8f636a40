"""Replay's part of a checkpoint: each row is written once, into files that checkpoints share."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.files import CheckpointError, checksum_of, read_msgpack, write_msgpack
from worldloom.locations import find, is_file, make_folder
from worldloom.manifest import read_manifest, row_numbers
from worldloom.replay.buffer import ReplayBuffer
from worldloom.runs.checkpoint import check_shards
from worldloom.types import Array, ColumnSpec

logger = logging.getLogger(__name__)

ROWS = "../rows"  # of files of rows, relative to a checkpoint
SEGMENT_BYTES = 256 * 2**20  # approximate size of a file of rows
ORIGIN = ColumnSpec((2,), "int32")  # actor and environment of a row


class RowsDamaged(CheckpointError):
    """The error of a file of rows that is missing or changed."""


@dataclass(frozen=True)
class ReplaySnapshot:
    """Replay's part of a checkpoint. Its rows may be read lazily; then replay must not change meanwhile."""

    oldest: int  # number of the oldest row that is held
    segments: Iterable[tuple[int, int, dict[str, Array]]]  # first and last row number (exclusive), columns
    state: dict[str, Any]
    extra: dict[str, Array] | None  # columns that the agent writes back, for every row


@dataclass(frozen=True)
class SavedReplay:
    """The files of one shard in a checkpoint, for the manifest."""

    rows: list[str]  # files of rows, oldest first
    files: dict[str, str]  # path relative to the checkpoint's folder -> checksum, of all files


@dataclass(frozen=True)
class RowsFile:
    """A file of consecutive rows, which checkpoints share."""

    first: int
    last: int  # exclusive
    name: str
    checksum: str


class ReplayStore:
    """Writes each row of replay once, into files of consecutive rows that are named by row numbers."""

    def __init__(self, run_dir: Path, shard: int = 0, shards: int = 1, compress: bool = False) -> None:
        self._folder = run_dir / "checkpoints" / "rows"
        self._shard, self._shards, self._compress = shard, shards, compress
        self._saved: list[RowsFile] = []

    def save(self, folder: Path, replay: ReplayBuffer, exact: bool = False) -> SavedReplay:
        """Snapshot and write at once, without a copy of everything; replay must not change meanwhile."""
        if self._rows_are_gone():
            logger.warning("files of rows are gone from %s, so all rows are written again", self._folder)
            self._saved = []
        return self.write(folder, self._take(replay, exact))

    def snapshot(self, replay: ReplayBuffer, exact: bool = False) -> ReplaySnapshot:
        """Copy the rows that were not saved yet, for `write`; replay may change afterwards. Touches no storage.

        Columns that an agent writes back change after their rows were saved; exact: save them for all rows each time.
        """
        taken = self._take(replay, exact)
        return replace(taken, segments=list(taken.segments))

    def _take(self, replay: ReplayBuffer, exact: bool) -> ReplaySnapshot:
        end = replay.accepted().rows
        oldest = end - len(replay)
        begin = max(self._saved[-1].last if self._saved else oldest, oldest)
        step = max(SEGMENT_BYTES // (replay.nbytes // replay.capacity), 1)
        cuts = [(first, min(first + step, end)) for first in range(begin, end, step)]
        extra = replay.rows_between(oldest, end, replay.extra_columns) if exact and replay.extra_columns else None
        segments = ((*cut, replay.rows_between(*cut)) for cut in cuts)
        return ReplaySnapshot(oldest, segments, replay.state_dict(), extra)

    def write(self, folder: Path, snapshot: ReplaySnapshot) -> SavedReplay:
        """Write a snapshot. Raises OSError; files written before it stay valid.

        It is raised as well if files of earlier rows are gone: then the next snapshot has all rows.
        """
        if self._rows_are_gone():
            self._saved = []
            raise FileNotFoundError(f"files of rows were deleted from {self._folder}")
        make_folder(self._folder)
        self._saved = [saved for saved in self._saved if saved.last > snapshot.oldest]
        taken = self._names_taken()
        for first, last, columns in snapshot.segments:
            name = self._free_name(first, last, taken)
            written = write_msgpack(self._folder / name, columns, self._compress)
            self._saved.append(RowsFile(first, last, name, written))
        files = {f"{ROWS}/{saved.name}": saved.checksum for saved in self._saved}
        state, extra = self._names()
        files[state] = write_msgpack(folder / state, snapshot.state)
        if snapshot.extra is not None:
            files[extra] = write_msgpack(folder / extra, snapshot.extra, self._compress)
        return SavedReplay([saved.name for saved in self._saved], files)

    def load(self, folder: Path, replay: ReplayBuffer) -> int:
        """Fill `replay` from a checkpoint; return how many rows are lost with files that are missing or damaged.

        Raises CheckpointError if it is of another replay, or if the state of replay or all rows cannot be read.
        """
        manifest = read_manifest(folder)
        check_shards(folder, manifest, self._shards)
        checksums, names = manifest.get("files", {}), manifest["rows"][self._shard]
        files = [RowsFile(*row_numbers(name), name, checksums.get(f"{ROWS}/{name}", "")) for name in names]
        try:
            return self._load(folder, replay, files, set())
        except RowsDamaged:  # rare, so that files are read twice only then
            damaged = self._damaged(files, replay)
        if len(damaged) == len(files):
            raise CheckpointError(
                f"{folder}: its files of rows {', '.join(names)} cannot be read. Delete it to use the one before it."
            )
        return self._load(folder, replay, files, damaged)

    def _load(self, folder: Path, replay: ReplayBuffer, files: list[RowsFile], damaged: set[RowsFile]) -> int:
        state, extra = self._names()
        lost = sum(file.last - file.first for file in damaged)
        rows = sum(file.last - file.first for file in files) - lost
        segments = (None if file in damaged else self._read(file, replay) for file in files)
        try:
            replay.load_state_dict(read_msgpack(folder / state), segments, rows, lost)
            if not lost and is_file(folder / extra):
                replay.fill_columns(read_msgpack(folder / extra))
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # of another replay, or other data
            raise CheckpointError(f"{folder}: {state} is of another replay or damaged: {error}") from error
        self._saved = [] if lost else [replace(f, checksum=f.checksum or checksum_of(self._path(f))) for f in files]
        return lost

    def _read(self, file: RowsFile, replay: ReplayBuffer) -> dict[str, Array]:
        """Read a file of rows. Raises RowsDamaged if it is missing, or holds anything but these rows."""
        try:
            columns: dict[str, Array] = read_msgpack(self._path(file), file.checksum or None)
        except CheckpointError as error:
            raise RowsDamaged(str(error)) from error
        expected = {**replay.specs, "origin": ORIGIN}
        found = columns if isinstance(columns, dict) else {}
        for name, spec in expected.items():
            shape = (file.last - file.first, *spec.shape)
            column = found.get(name)
            if not isinstance(column, np.ndarray) or column.shape != shape or column.dtype != spec.dtype:
                raise RowsDamaged(f"{self._path(file)} holds no column {name!r} {spec.dtype} of shape {shape}.")
        return columns

    def _damaged(self, files: Sequence[RowsFile], replay: ReplayBuffer) -> set[RowsFile]:
        """Return the files that are missing or cannot be read. Only one is read at a time, because together they may be
        as large as replay."""
        found = set()
        for file in files:
            try:
                self._read(file, replay)
            except RowsDamaged as error:
                logger.warning("%d rows of replay are lost: %s", file.last - file.first, error)
                found.add(file)
        return found

    def _names(self) -> tuple[str, str]:
        """Return the names of this shard's files in a checkpoint: its state, and columns that were written back."""
        return f"replay-{self._shard}.msgpack", f"columns-{self._shard}.msgpack"

    def _path(self, file: RowsFile) -> Path:
        return self._folder / file.name

    def _rows_are_gone(self) -> bool:
        return bool(self._saved) and not self._names_taken().issuperset(saved.name for saved in self._saved)

    def _names_taken(self) -> set[str]:
        return {path.name for path in find(self._folder, f"{self._shard}-*.msgpack")}

    def _free_name(self, first: int, last: int, taken: set[str]) -> str:
        """Return a file name that is free, because another checkpoint may need the existing files."""
        attempts = (
            f"{self._shard}-{first:012d}-{last:012d}{again}.msgpack"
            for again in chain([""], map("-{}".format, count(1)))
        )
        return next(name for name in attempts if name not in taken)
