"""The ring of rows: numpy columns, in which new rows replace the oldest and each row links to the next one."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from worldloom.replay.memory import check_memory
from worldloom.replay.windows import Stream, WindowIndex
from worldloom.types import Array, ColumnSpec, WindowSpec


class Ring:
    """The last `capacity` rows of all streams, and which of them start a complete window.

    A stream holds the rows of one environment of one actor, and is named (actor, environment). Rows are numbered in
    order of arrival; a row lies at its number modulo the capacity. Raises MemoryError if the ring would not fit in
    memory.
    """

    def __init__(self, capacity: int, specs: Mapping[str, ColumnSpec], windows: WindowSpec) -> None:
        check_memory(capacity, specs)
        self.capacity, self.specs = capacity, specs
        self.columns = {name: np.empty((capacity, *s.shape), s.dtype) for name, s in specs.items()}
        self.index = WindowIndex(windows, capacity)
        self.fresh: deque[int] = deque(maxlen=max(capacity // windows.length, 1))  # starts not drawn yet
        self.rows = self.steps = self.episodes = 0  # accepted since the start
        self.begin = 0  # number of the first row that was ever held; after a restore, of the first restored row
        self._next = np.full(capacity, -1, np.int64)  # ring position of the row that follows, -1 if none yet
        self._origin = np.empty((capacity, 2), np.int32)  # actor, environment
        self._streams: dict[tuple[int, int], Stream] = {}

    def __len__(self) -> int:
        """Return the number of rows that are held."""
        return self.rows - self.oldest

    @property
    def oldest(self) -> int:
        """Number of the oldest row that is held."""
        return max(self.rows - self.capacity, self.begin)

    # In

    def clear(self) -> None:
        """Forget all rows, streams and counts."""
        self.rows = self.steps = self.episodes = self.begin = 0
        self.index.clear()
        self.fresh.clear()
        self._streams.clear()

    def check(self, columns: Mapping[str, Array], rows: int) -> None:
        """Raise ValueError for columns of other names, shapes or lengths, for values that replay would change, and
        for more rows than the capacity."""
        if columns.keys() != self.specs.keys():
            raise ValueError(f"replay got columns {sorted(columns)}, expected {sorted(self.specs)}.")
        for name, spec in self.specs.items():
            if columns[name].shape != (rows, *spec.shape):
                raise ValueError(f"replay column {name!r} is {columns[name].shape}, expected {(rows, *spec.shape)}.")
            if not _keeps(spec.dtype, values := columns[name]):
                raise ValueError(
                    f"{name} holds {values.dtype} from {values.min():g} to {values.max():g}, which replay would "
                    f"change to {spec.dtype}. Give images of 0 to 255, or make the buffer with obs_dtype='float32'."
                )
        if rows > self.capacity:
            raise ValueError(f"{rows} rows at once exceed replay.capacity={self.capacity}. Raise capacity.")

    def append(self, origin: tuple[int, int], columns: Mapping[str, Array]) -> None:
        """Write consecutive rows of one stream over the oldest rows and link them."""
        stream = self._streams.setdefault(origin, Stream(self.index.spec))
        previous, count = stream.last, len(columns["rewards"])
        columns = self._end_interrupted(previous, columns)
        numbers = np.arange(self.rows, self.rows + count)
        positions = numbers % self.capacity
        if self.rows + count > self.capacity:
            self.index.remove(positions)
        for name, column in columns.items():
            self.columns[name][positions] = column
        self._origin[positions] = origin
        self._next[positions[:-1]] = positions[1:]
        self._next[positions[-1]] = -1
        oldest = self.rows + count - self.capacity
        if previous >= max(oldest, self.begin):
            self._next[previous % self.capacity] = positions[0]
        starts, fresh = stream.extend(numbers, columns["is_first"], oldest)
        self.index.add(starts % self.capacity)
        if self.index.spec.online_queue:
            self.fresh.extend(fresh.tolist())
        self.rows += count
        self.steps += int((~columns["is_first"]).sum())
        self.episodes += int((columns["terminated"] | columns["truncated"]).sum())

    def _end_interrupted(self, previous: int, columns: Mapping[str, Array]) -> Mapping[str, Array]:
        """Mark episodes that stop without an end (their actor died) as truncated, never as terminated.

        previous: number of the stream's last row, -1 if there is none.
        """
        ended, is_first = columns["terminated"] | columns["truncated"], columns["is_first"]
        if is_first[0] and previous >= self.oldest:
            self._truncate(previous)
        open_ends = is_first[1:] & ~ended[:-1]
        if not open_ends.any():
            return columns
        truncated = columns["truncated"].copy()
        truncated[:-1] |= open_ends
        return {**columns, "truncated": truncated}

    def _truncate(self, row: int) -> None:
        """End the episode at that row number, unless it has ended there."""
        at = row % self.capacity
        if not (self.columns["terminated"][at] or self.columns["truncated"][at]):
            self.columns["truncated"][at] = True
            self.episodes += 1

    def forget_streams(self) -> None:
        """End all open episodes: later rows do not continue them."""
        for stream in self._streams.values():
            if stream.last >= self.oldest:
                self._truncate(stream.last)
        self._streams.clear()

    def fill(self, columns: Mapping[str, Array]) -> None:
        """Replace whole columns of every row that is held, oldest first: [rows, ...] each."""
        positions = np.arange(self.oldest, self.rows) % self.capacity
        for name, values in columns.items():
            self.columns[name][positions] = values

    # Out

    def follow(self, starts: Array, length: int) -> Array:
        """Return ring positions [B, T] of the windows of `length` rows that begin at positions [B]."""
        positions = np.empty((len(starts), length), np.int64)
        positions[:, 0] = starts
        for t in range(1, length):
            positions[:, t] = self._next[positions[:, t - 1]]
        return positions

    def find_starts(self, length: int, crosses: bool) -> Array:
        """Return ring positions that start a window of `length` rows, oldest first; crosses: over is_first rows too.

        The search doubles its step: `hop` leads 1, 2, 4, … rows ahead, or to -1 if no window goes that far.
        """
        live = np.arange(self.oldest, self.rows) % self.capacity
        hop = self._next.copy()
        if not crosses:
            hop[(hop >= 0) & self.columns["is_first"][hop]] = -1
        at, left = live, length - 1
        while left:
            if left & 1:
                at = np.where(at >= 0, hop[at], -1)
            hop = np.where(hop >= 0, hop[hop], -1)
            left >>= 1
        return live[at >= 0]

    def rows_between(self, begin: int, end: int, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Return the columns of rows begin to end (exclusive) and the stream of each row, or only columns `names`."""
        positions = np.arange(begin, end) % self.capacity
        if names is not None:
            return {name: self.columns[name][positions] for name in names}
        return {**{n: c[positions] for n, c in self.columns.items()}, "origin": self._origin[positions]}

    def held(self) -> dict[str, Array]:
        """Return all rows that are held, as `rows_between` does; without a copy while the ring has never wrapped."""
        if self.oldest:
            return self.rows_between(self.oldest, self.rows)
        return {**{n: c[: self.rows] for n, c in self.columns.items()}, "origin": self._origin[: self.rows]}


def _keeps(dtype: str, values: Array) -> bool:
    """Return whether a column keeps the values (uint8 makes zeros of floats in [0, 1]); floats may be rounded."""
    if np.can_cast(values.dtype, dtype, "safe") or np.dtype(dtype).kind == "f":
        return True
    with np.errstate(invalid="ignore"):  # the cast of what does not fit
        return np.array_equal(values.astype(dtype), values)
