"""The rows of replay that may start a window: updated row by row, drawn uniformly in constant time, or by age."""

from __future__ import annotations

import numpy as np

from worldloom.types import Array, WindowSpec


class WindowIndex:
    """The set of valid window starts, as a dense array with a slot per row: O(1) insertion, removal and draw.

    Rows are identified by ring position. A row becomes a start once the last row of its window has arrived, and stops
    being one when it is evicted. Eviction affects no other start, because the start of a window is its oldest row.
    """

    def __init__(self, spec: WindowSpec, capacity: int) -> None:
        self.spec = spec
        self._starts = np.empty(capacity, np.int64)
        self._slot = np.full(capacity, -1, np.int64)
        self.count = 0
        self._by_age: Array | None = None  # positions of all starts, oldest first, since they last changed

    def add(self, positions: Array) -> None:
        """Add ring positions [n], each of which now starts a complete window."""
        slots = np.arange(self.count, self.count + len(positions))
        self._starts[slots] = positions
        self._slot[positions] = slots
        self.count += len(positions)
        self._by_age = None

    def remove(self, positions: Array) -> None:
        """Remove ring positions [n] that are about to be overwritten; the last starts move into the free slots."""
        holes = self._slot[positions]
        holes = holes[holes >= 0]
        if not len(holes):
            return
        self._by_age = None
        self._slot[positions] = -1
        left = self.count - len(holes)
        tail = self._starts[left : self.count]
        movers, holes = tail[self._slot[tail] >= 0], np.sort(holes[holes < left])
        self._starts[holes] = movers
        self._slot[movers] = holes
        self.count = left

    def draw(self, rng: np.random.Generator, batch_size: int, oldest: int) -> Array:
        """Draw ring positions [B] with replacement, uniformly or as the spec's `recency` says.

        oldest: ring position of the oldest row.
        """
        if not self.spec.recency:
            return self._starts[rng.integers(self.count, size=batch_size)]
        if self._by_age is None:
            starts = np.flatnonzero(self._slot >= 0)
            self._by_age = np.roll(starts, -int(np.searchsorted(starts, oldest)))
        return self.pick(rng, self._by_age, batch_size)

    def pick(self, rng: np.random.Generator, starts: Array, count: int) -> Array:
        """Draw `count` of the starts, oldest first, with replacement: uniformly, or by shares, the spec's `recency`.

        Each share is the chance of one of so many parts of equal size, within which draws are uniform. A part without
        starts, while there are fewer than parts, gives its share to the others.
        """
        parts = len(self.spec.recency)
        if not parts:
            return rng.choice(starts, count)
        cuts = np.arange(parts + 1) * len(starts) // parts
        held = np.diff(cuts) > 0
        shares = np.where(held, self.spec.recency, 0.0)
        shares = shares if shares.any() else held.astype(np.float64)
        part = rng.choice(parts, count, p=shares / shares.sum())
        return starts[rng.integers(cuts[part], cuts[part + 1])]

    def holds(self, positions: Array) -> Array:
        """Return flags [n]: whether these ring positions start a complete window."""
        held: Array = self._slot[positions] >= 0
        return held

    def sort(self) -> None:
        """Bring the starts, which `draw` indexes, into the order of the ring."""
        starts = np.flatnonzero(self._slot >= 0)
        self._starts[: self.count] = starts
        self._slot[starts] = np.arange(self.count)

    def clear(self) -> None:
        self._slot[:] = -1
        self.count = 0
        self._by_age = None


class Stream:
    """State of one sequence of rows, from which follows which windows its next rows complete."""

    def __init__(self, spec: WindowSpec) -> None:
        self._spec = spec
        self.last = -1  # number of the newest row, -1 if there is none
        self._tail = np.empty(0, np.int64)  # row numbers of the last T - 1 rows
        self._run = 0  # newest consecutive rows that one window may hold
        self._rows = 0

    def extend(self, numbers: Array, is_first: Array, oldest: int) -> tuple[Array, Array]:
        """Append rows with consecutive `numbers` [n]. Return the row numbers that now start a complete window, and
        those among them whose windows follow each other without overlap, so that together they cover the stream once.

        oldest: rows with smaller numbers are evicted.
        """
        length = self._spec.length
        runs = np.arange(self._run + 1, self._run + 1 + len(numbers))
        if not self._spec.crosses_episodes:
            begins = np.where(is_first, np.arange(len(numbers)), -1)
            last = np.maximum.accumulate(begins)
            runs = np.where(last >= 0, np.arange(len(numbers)) - last + 1, runs)
        self._run = int(runs[-1])
        known = np.concatenate([self._tail, numbers])
        complete = np.flatnonzero(runs >= length)
        starts = known[complete + len(self._tail) - (length - 1)]
        fresh = (self._rows + complete + 1) % length == 0
        self._rows += len(numbers)
        self.last = int(numbers[-1])
        self._tail = known[len(known) - min(length - 1, len(known)) :]
        kept = starts >= oldest
        return starts[kept], starts[kept & fresh]
