"""The replay buffer: stores chunks of rows and draws windows of consecutive rows."""

from __future__ import annotations

import bisect
import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from worldloom.archive import UNREADABLE, explain
from worldloom.replay.chunk import Chunk, Ledger, base_columns, observation_dtypes, with_seam
from worldloom.replay.memory import ring_bytes
from worldloom.replay.recorded import LAST_ACTION_DROPPED, constant_columns, episode_columns, read_trajectories
from worldloom.replay.ring import Ring
from worldloom.replay.storage import read_buffer, restore, take_state, write_buffer
from worldloom.types import Array, Batch, ColumnSpec, ObsShape, WindowSpec, join_obs, split_obs

logger = logging.getLogger(__name__)

RECORDED = (-1, 0)  # the stream of episodes that a user added


@dataclass(frozen=True)
class Acceptance:
    """Counts of what replay has accepted so far."""

    rows: int
    steps: int  # environment steps: rows that an action led to
    episodes: int  # episodes that ended, terminated or truncated
    chunks: int
    duplicates: int  # chunks that arrived again and were ignored
    windows: int  # windows that can be drawn now; the only count that can also fall


class ReplayBuffer:
    """Keeps the last `capacity` rows, and draws windows of consecutive rows from them, as `windows` says.

    capacity: rows. obs_shape, obs_dtype: of one observation, or mappings of them; obs_dtype None takes uint8 for
    images (three axes) and float32 for vectors. windows: length, context and whether they may cross is_first rows; by
    default single-episode windows of 50 rows (fewer if capacity is smaller). columns: extra columns that an agent
    declares. Raises MemoryError if the rows would not fit in memory, ValueError if capacity is less than a window.
    """

    def __init__(
        self,
        capacity: int,
        obs_shape: Sequence[int] | Mapping[str, tuple[int, ...]],
        action_dim: int,
        *,
        obs_dtype: str | Mapping[str, str] | None = None,
        windows: WindowSpec | None = None,
        columns: Mapping[str, ColumnSpec] | None = None,
        seed: int = 0,
    ) -> None:
        if capacity < 1 or action_dim < 1:
            raise ValueError(f"ReplayBuffer: capacity is {capacity} and action_dim {action_dim}, expected at least 1.")
        self.windows = windows or WindowSpec(length=min(50, capacity), context=0, crosses_episodes=False)
        if capacity < self.windows.length:
            raise ValueError(
                f"replay.capacity is {capacity}, expected at least one window of {self.windows.length} rows. "
                "Raise capacity or shorten the windows."
            )
        self.capacity, self.action_dim = capacity, action_dim
        self.obs_shape: ObsShape = obs_shape if isinstance(obs_shape, Mapping) else tuple(obs_shape)
        shapes = split_obs(self.obs_shape)
        for name, shape in shapes.items():
            if not all(isinstance(size, int) and size >= 1 for size in shape):
                raise ValueError(f"ReplayBuffer: {name} has shape {shape}, expected whole numbers of at least 1.")
        dtypes = observation_dtypes(shapes, obs_dtype)
        base = base_columns({name: ColumnSpec(shape, dtypes[name]) for name, shape in shapes.items()}, action_dim)
        if taken := base.keys() & (columns or {}).keys():
            raise ValueError(f"replay has columns {sorted(taken)} already. Rename the agent's columns.")
        self.extra_columns = list(columns or {})  # names of the columns that an agent declared
        self.specs: dict[str, ColumnSpec] = {**base, **(columns or {})}
        self._ring = Ring(capacity, self.specs, self.windows)
        self._ledger = Ledger()
        self._rng = np.random.default_rng([seed, 0x5EED])
        self._lengths: dict[int, tuple[int, Array]] = {}  # starts of windows of other lengths
        self._warned = False  # of dropped last actions

    def __len__(self) -> int:
        """Return the number of rows that can be drawn from."""
        return len(self._ring)

    @property
    def nbytes(self) -> int:
        return ring_bytes(self.capacity, self.specs)

    @property
    def num_windows(self) -> int:
        """Number of distinct windows that `sample` draws from."""
        return self._ring.index.count

    @property
    def num_episodes(self) -> int:
        """Number of episodes that ended since the start, evicted ones included."""
        return self._ring.episodes

    def accepted(self) -> Acceptance:
        ring, ledger = self._ring, self._ledger
        return Acceptance(ring.rows, ring.steps, ring.episodes, ledger.chunks, ledger.duplicates, ring.index.count)

    # In

    def insert(self, chunk: Chunk) -> Acceptance:
        """Store a chunk. One whose key was accepted before, or is older than its actor's last one, is ignored.

        If a chunk is missing before it, no window runs over the gap: its rows start with a seam.
        Raises ValueError for columns of other names, shapes or lengths, before anything is changed.
        """
        self._ring.check(chunk.columns, sum(chunk.lengths))
        complete = self._ledger.follows(chunk.info.key)
        if not self._ledger.admit(chunk.info.key):
            return self.accepted()
        begin = 0
        for env, length in enumerate(chunk.lengths):
            if length:
                columns = {name: column[begin : begin + length] for name, column in chunk.columns.items()}
                self._ring.append((chunk.info.key.actor, env), columns if complete else with_seam(columns))
            begin += length
        return self.accepted()

    def add_episode(
        self,
        *,
        obs: Any,
        actions: Any,
        rewards: Any,
        dones: Any,
        truncated: bool = False,  # noqa: ARG002 - every episode without a true end is truncated
        **columns: Any,
    ) -> None:
        """Add a recorded episode of L actions in Gymnasium's order: actions[t] was taken at obs[t].

        obs: [L + 1, *obs_shape], or [L, ...] if the observation after the last action was not recorded: that action is
        then dropped. actions: [L, A] in [-1, 1] or one-hot, or [L] integers below A, which become one-hot. rewards,
        dones: [L]; only the last done may be set, and it means a true end. truncated: the episode was cut short by a
        time limit; this is assumed of every episode without a true end. columns: values of the agent's extra columns,
        the same for all rows (task=3); zeros if not given.
        Raises ValueError before anything is changed.
        """
        if unknown := columns.keys() - set(self.extra_columns):
            raise ValueError(
                f"add_episode: {sorted(unknown)} are no extra columns, expected {sorted(self.extra_columns)}."
            )
        parts = {name: np.asarray(value) for name, value in split_obs(obs).items()}
        taken = np.asarray(actions)
        recorded = episode_columns(parts, taken, np.asarray(rewards), np.asarray(dones), self.action_dim)
        rows = len(recorded["rewards"])
        if rows == len(taken) and not self._warned:
            logger.warning(LAST_ACTION_DROPPED)
            self._warned = True
        recorded |= constant_columns({name: self.specs[name] for name in self.extra_columns}, columns, rows)
        self._ring.check(recorded, rows)
        self._ring.append(RECORDED, recorded)

    @classmethod
    def from_trajectories(
        cls,
        trajectories: Iterable[Any],
        *,
        capacity: int | None = None,
        obs_shape: Sequence[int] | Mapping[str, tuple[int, ...]] | None = None,
        action_dim: int | None = None,
        action_range: tuple[Any, Any] | None = None,
        **options: Any,
    ) -> ReplayBuffer:
        """Make a buffer of recorded episodes, from `worldloom.training.read_episodes`, Minari, or your own data.

        trajectories: mappings or objects with observations (or obs), actions, rewards, and terminations (or dones)
        and truncations; `worldloom.replay.recorded.NAMES` lists every name that is read. Shapes come from the first
        episode, the number of choices of integer actions from all. action_range: (low, high) of continuous actions,
        which are then scaled to [-1, 1]. capacity: rows; None takes as many as the episodes have. options: further
        arguments of ReplayBuffer. Raises ValueError that names the episode.
        """
        episodes = read_trajectories(trajectories, action_range)
        shape = obs_shape if obs_shape is not None else episodes[0].obs_shape
        size = action_dim if action_dim is not None else max(episode.action_dim for episode in episodes)
        buffer = cls(capacity or sum(episode.rows for episode in episodes), shape, size, **options)
        for number, episode in enumerate(episodes):
            try:
                buffer.add_episode(**episode.fields())
            except ValueError as error:
                raise ValueError(f"episode {number}: {error}") from error
        return buffer

    # Out

    def draw(
        self, batch_size: int, seq_len: int | None = None, rng: np.random.Generator | None = None
    ) -> dict[str, Array]:
        """Draw one batch as numpy: every column [B, T, ...] (`as_batch` joins those of a mapping), `continues`, and the
        row numbers `rows`. seq_len: T; None takes that of `windows`. rng: None takes the buffer's own generator.

        In windows of the agent's own length, columns that it reads only in the context rows hold only those rows.

        Raises ValueError if no complete window of seq_len rows is held.
        """
        if batch_size < 1:
            raise ValueError(f"sample: batch_size is {batch_size}, expected at least 1.")
        length = self.windows.length if seq_len is None else seq_len
        self.check_length(length)
        ring = self._ring
        positions = ring.follow(self._draw_starts(batch_size, length, rng), length)
        leading = positions[:, : self.windows.context] if length == self.windows.length else positions
        batch = {
            name: column.take(leading if self.specs[name].context_only else positions, axis=0)
            for name, column in ring.columns.items()
        }
        batch["continues"] = (~batch["terminated"]).astype(np.float32)
        batch["rows"] = ring.rows - 1 - (ring.rows - 1 - positions) % self.capacity  # the newest row less its age
        return batch

    def _draw_starts(self, batch_size: int, length: int, rng: np.random.Generator | None) -> Array:
        """Draw ring positions [B]: windows that were never drawn first, each once, then uniformly or by age."""
        rng = rng or self._rng
        if length != self.windows.length:
            return self._ring.index.pick(rng, self._starts_of(length), batch_size)
        fresh: list[int] = []
        while self._ring.fresh and len(fresh) < batch_size:
            start = self._ring.fresh.popleft()
            if start >= self._ring.rows - self.capacity:
                fresh.append(start % self.capacity)
        drawn = self._ring.index.draw(rng, batch_size - len(fresh), self._ring.oldest % self.capacity)
        return np.concatenate([np.array(fresh, np.int64), drawn])

    def draw_sequence(self, longest: int, rng: np.random.Generator | None = None) -> dict[str, Array] | None:
        """Draw columns [T, ...] of one sequence within an episode, of `longest` rows or, if no episode has so many, of
        half, a quarter, …; None while no episode has two rows."""
        while longest > 1:
            starts = self._ring.find_starts(longest, crosses=False)
            if len(starts):
                start = (rng or self._rng).choice(starts)
                positions = self._ring.follow(np.array([start]), longest)[0]
                return {name: column[positions] for name, column in self._ring.columns.items()}
            longest //= 2
        return None

    def check_length(self, seq_len: int) -> None:
        """Raise ValueError if no window of seq_len rows can be drawn."""
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}, expected at least 1.")
        if self.num_windows if seq_len == self.windows.length else len(self._starts_of(seq_len)):
            return
        longest = bisect.bisect_left(range(1, len(self) + 1), True, key=lambda n: not len(self._find_starts(n)))
        raise ValueError(
            f"replay holds {len(self)} rows but no complete window of {seq_len}: the longest has {longest}. "
            "Collect more, or shorten the sequences."
        )

    def _starts_of(self, length: int) -> Array:
        """Return ring positions that start a window of `length` rows, oldest first; cached until rows arrive."""
        rows, starts = self._lengths.get(length, (-1, np.empty(0, np.int64)))
        if rows != self._ring.rows:
            starts = self._find_starts(length)
            self._lengths[length] = (self._ring.rows, starts)
        return starts

    def _find_starts(self, length: int) -> Array:
        return self._ring.find_starts(length, self.windows.crosses_episodes)

    def sample(
        self,
        batch_size: int,
        seq_len: int | None = None,
        device: torch.device | str = "cpu",
        rng: np.random.Generator | None = None,
    ) -> Batch:
        """Draw one batch as tensors [B, T, ...]; see `draw` for the arguments and `worldloom.types.Batch`."""
        columns = self.draw(batch_size, seq_len, rng)
        return as_batch({name: torch.from_numpy(column).to(device) for name, column in columns.items()})

    def write_back(self, rows: Array, columns: Mapping[str, Array]) -> int:
        """Replace entries of extra columns at row numbers [B, T]; return how many rows were skipped as evicted.

        columns: [B, T', ...], for the last T' rows of each window.
        """
        rows = rows[:, -next(iter(columns.values())).shape[1] :]
        gone = rows < self._ring.rows - self.capacity
        for name, values in columns.items():
            self._ring.columns[name][rows[~gone] % self.capacity] = values[~gone]
        return int(gone.sum())

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the rows themselves, which `rows_between` returns."""
        return take_state(self._ring, self._ledger, self._rng)

    def rows_between(self, begin: int, end: int, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Return the columns of rows begin to end (exclusive) and the stream of each row, or only columns `names`."""
        return self._ring.rows_between(begin, end, names)

    def fill_columns(self, columns: Mapping[str, Array]) -> None:
        """Replace whole columns of every row that is held, oldest first: [rows, ...] each."""
        self._ring.fill(columns)

    def load_state_dict(
        self, state: Mapping[str, Any], segments: Iterable[Mapping[str, Array] | None], rows: int, lost: int = 0
    ) -> None:
        """Restore what `state_dict` returned, from segments of consecutive rows in order, `rows` rows in total.

        None stands for a lost segment: its rows (`lost` in total) count as evicted, and no window crosses the gap.
        Raises ValueError if the columns differ or rows are missing.
        """
        restore(self._ring, self._ledger, self._rng, state, segments, rows, lost)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything into one npz file, completely or not at all; no entry is pickled."""
        about = {
            "capacity": self.capacity,
            "action_dim": self.action_dim,
            "windows": dataclasses.asdict(self.windows),
            "extra": {name: [list(self.specs[name].shape), self.specs[name].dtype] for name in self.extra_columns},
            "state": self.state_dict(),
        }
        write_buffer(path, about, self._ring.held())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ReplayBuffer:
        """Load a buffer that `save` wrote; it goes on with the same draws. Raises FileNotFoundError, or ValueError for
        a file of another kind, one that is damaged, or one whose capacity does not fit in memory."""
        about, columns = read_buffer(path)
        try:
            specs = {name: ColumnSpec(tuple(shape), dtype) for name, (shape, dtype) in about["state"]["specs"].items()}
            buffer = cls(
                about["capacity"],
                join_obs({name: spec.shape for name, spec in specs.items()}),
                about["action_dim"],
                obs_dtype=join_obs({name: spec.dtype for name, spec in specs.items()}),
                windows=WindowSpec(**about["windows"]),
                columns={name: specs[name] for name in about["extra"]},
            )
            buffer.load_state_dict(about["state"], [columns], len(columns["rewards"]))
        except UNREADABLE as error:
            raise ValueError(f"{path} cannot be loaded: {explain(error)}") from error
        return buffer


def as_batch(columns: Mapping[str, torch.Tensor]) -> Batch:
    """Return columns [B, T, ...] as agents read them: the columns of a mapping of observations are joined."""
    rest = {name: value for name, value in columns.items() if not name.startswith("obs/")}
    return cast(Batch, {**rest, "obs": join_obs(columns)})
