"""Replay's part of a checkpoint: each row is written once, into files that checkpoints share."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from worldloom.files import CheckpointError, read_msgpack, write_msgpack
from worldloom.manifest import read_manifest
from worldloom.replay.buffer import ReplayBuffer
from worldloom.runs.checkpoint import check_shards
from worldloom.types import Array

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 256 * 2**20  # approximate size of a file of rows


@dataclass(frozen=True)
class ReplaySnapshot:
    """Replay's part of a checkpoint. Its rows may be read lazily; then replay must not change meanwhile."""

    oldest: int  # number of the oldest row that is held
    segments: Iterable[tuple[int, int, dict[str, Array]]]  # first and last row number (exclusive), columns
    state: dict[str, Any]
    extra: dict[str, Array] | None  # columns that the agent writes back, for every row


class ReplayStore:
    """Writes each row of replay once, into files of consecutive rows that are named by row numbers."""

    def __init__(self, run_dir: Path, shard: int = 0, shards: int = 1, compress: bool = False) -> None:
        self._folder = run_dir / "checkpoints" / "rows"
        self._shard, self._shards, self._compress = shard, shards, compress
        self._saved: list[tuple[int, int, str]] = []  # first and last row, file

    def save(self, folder: Path, replay: ReplayBuffer, exact: bool = False) -> list[str]:
        """Snapshot and write at once, without a copy of everything; replay must not change meanwhile."""
        return self.write(folder, self._take(replay, exact))

    def snapshot(self, replay: ReplayBuffer, exact: bool = False) -> ReplaySnapshot:
        """Copy the rows that were not saved yet, for `write`; replay may change afterwards.

        Columns that an agent writes back change after their rows were saved; exact: save them for all rows each time.
        """
        taken = self._take(replay, exact)
        return replace(taken, segments=list(taken.segments))

    def _take(self, replay: ReplayBuffer, exact: bool) -> ReplaySnapshot:
        end = replay.accepted().rows
        oldest = end - len(replay)
        begin = max(self._saved[-1][1] if self._saved else oldest, oldest)
        step = max(SEGMENT_BYTES // (replay.nbytes // replay.capacity), 1)
        cuts = [(first, min(first + step, end)) for first in range(begin, end, step)]
        extra = replay.rows_between(oldest, end, replay.extra_columns) if exact and replay.extra_columns else None
        segments = ((*cut, replay.rows_between(*cut)) for cut in cuts)
        return ReplaySnapshot(oldest, segments, replay.state_dict(), extra)

    def write(self, folder: Path, snapshot: ReplaySnapshot) -> list[str]:
        """Write a snapshot; return the files that hold its rows. Raises OSError; files written before it stay valid."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._saved = [(first, last, name) for first, last, name in self._saved if last > snapshot.oldest]
        for first, last, columns in snapshot.segments:
            name = self._free_name(first, last)
            write_msgpack(self._folder / name, columns, self._compress)
            self._saved.append((first, last, name))
        write_msgpack(folder / f"replay-{self._shard}.msgpack", snapshot.state)
        if snapshot.extra is not None:
            write_msgpack(folder / f"columns-{self._shard}.msgpack", snapshot.extra, self._compress)
        return [name for *_, name in self._saved]

    def load(self, folder: Path, replay: ReplayBuffer) -> int:
        """Fill `replay` from a checkpoint; return how many rows are lost with files that are missing or damaged.

        Raises CheckpointError if it is of another replay, or if the state of replay or all rows cannot be read.
        """
        manifest = read_manifest(folder)
        check_shards(folder, manifest, self._shards)
        names: list[str] = manifest["rows"][self._shard]
        damaged = self._damaged(names)
        if damaged and len(damaged) == len(names):
            raise CheckpointError(
                f"{folder}: its files of rows {', '.join(names)} cannot be read. Delete it to use the one before it."
            )
        counts = {name: last - first for name in names for first, last in [self._numbers(name)]}
        lost = sum(counts[name] for name in damaged)
        segments = (None if name in damaged else read_msgpack(self._folder / name) for name in names)
        try:
            state = read_msgpack(folder / f"replay-{self._shard}.msgpack")
            replay.load_state_dict(state, segments, sum(counts.values()) - lost, lost)
            if not lost and (columns := folder / f"columns-{self._shard}.msgpack").is_file():
                replay.fill_columns(read_msgpack(columns))
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        self._saved = [] if lost else [(*self._numbers(name), name) for name in names]
        return lost

    def _damaged(self, names: Sequence[str]) -> set[str]:
        """Return the files that are missing or cannot be read. Only one is read at a time, because together they may be
        as large as replay."""
        found = set()
        for name in names:
            try:
                read_msgpack(self._folder / name)
            except CheckpointError as error:
                first, last = self._numbers(name)
                logger.warning("%d rows of replay are lost: %s", last - first, error)
                found.add(name)
        return found

    def _free_name(self, first: int, last: int) -> str:
        """Return a file name that is free, because another checkpoint may need the existing files."""
        attempts = (
            f"{self._shard}-{first:012d}-{last:012d}{again}.msgpack"
            for again in chain([""], map("-{}".format, count(1)))
        )
        return next(name for name in attempts if not (self._folder / name).exists())

    @staticmethod
    def _numbers(name: str) -> tuple[int, int]:
        _, first, last, *_ = name.removesuffix(".msgpack").split("-")
        return int(first), int(last)
