"""The replay buffer: one ring of rows in numpy, chunks in, windows out."""

from __future__ import annotations

import bisect
import dataclasses
import logging
import os
import zipfile
import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from worldloom.encoding import pack, unpack
from worldloom.replay.chunk import Chunk, base_columns, row_bytes
from worldloom.replay.recorded import Episode
from worldloom.replay.windows import Stream, WindowIndex
from worldloom.types import Array, Batch, ColumnSpec, ObsShape, WindowSpec, is_image, join_obs, split_obs

logger = logging.getLogger(__name__)

FORMAT = 1  # of saved buffers
RECORDED = -1  # the actor number of episodes that a user added


@dataclass(frozen=True)
class Acceptance:
    """What replay has accepted so far; every count only grows."""

    rows: int
    steps: int  # environment steps: rows that an action led to
    episodes: int  # ended, by a true end or cut short
    chunks: int
    duplicates: int  # chunks that came again and were ignored
    windows: int  # that can be drawn now; unlike the rest it may shrink


class ReplayBuffer:
    """The last `capacity` rows, and windows of consecutive rows drawn uniformly from them.

    capacity: rows. obs_shape, obs_dtype: of one observation, or mappings of them; obs_dtype None takes uint8 for
    images (three axes) and float32 for vectors. windows: length, context and whether they may cross is_first rows; by
    default single-episode windows of 50 rows (fewer if capacity is smaller). columns: extra columns that an agent
    declares. Raises MemoryError if the ring would not fit in memory, ValueError if it is shorter than a window.
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
            raise ValueError(f"replay columns {sorted(taken)} are taken. Rename the agent's columns.")
        self._extra = dict(columns or {})
        self.specs: dict[str, ColumnSpec] = {**base, **self._extra}
        check_memory(capacity, self.specs)
        self._columns = {name: np.empty((capacity, *s.shape), s.dtype) for name, s in self.specs.items()}
        self._next = np.full(capacity, -1, np.int64)  # ring position of the row that follows, -1 if none yet
        self._origin = np.empty((capacity, 2), np.int32)  # actor, environment
        self._index = WindowIndex(self.windows, capacity)
        self._rng = np.random.default_rng([seed, 0x5EED])
        self._online: deque[int] = deque(maxlen=max(capacity // self.windows.length, 1))  # starts not drawn yet
        self._streams: dict[tuple[int, int], Stream] = {}
        self._last: dict[tuple[int, int], int] = {}  # row number of each stream's last row
        self._sequence: dict[int, tuple[int, int]] = {}  # actor -> last accepted (incarnation, sequence)
        self._lengths: dict[int, tuple[int, Array]] = {}  # starts of windows of other lengths
        self._rows = self._steps = self._episodes = self._chunks = self._duplicates = 0
        self._begin = 0  # number of the first row that was ever here; later where a checkpoint had lost rows
        self._recorded = 0

    def __len__(self) -> int:
        """Rows that can be drawn from."""
        return self._rows - self._oldest

    @property
    def _oldest(self) -> int:
        """Number of the oldest row that is held."""
        return max(self._rows - self.capacity, self._begin)

    @property
    def nbytes(self) -> int:
        return ring_bytes(self.capacity, self.specs)

    @property
    def num_windows(self) -> int:
        """Distinct windows that `sample` draws from."""
        return self._index.count

    @property
    def num_episodes(self) -> int:
        """Episodes that ended since the start, evicted ones included."""
        return self._episodes

    def accepted(self) -> Acceptance:
        counts = (self._rows, self._steps, self._episodes, self._chunks, self._duplicates)
        return Acceptance(*counts, self._index.count)

    # In

    def insert(self, chunk: Chunk) -> Acceptance:
        """Copy a chunk in. A key that was accepted before, or is older than one that was, changes nothing.

        Raises ValueError for columns of other names, shapes or lengths, before anything is changed.
        """
        self._check(chunk.columns, sum(chunk.lengths))
        actor, incarnation, sequence = chunk.info.key
        last = self._sequence.get(actor)
        if last is not None and (incarnation, sequence) <= last:
            self._duplicates += 1
            return self.accepted()
        self._sequence[actor] = (incarnation, sequence)
        begin = 0
        for env, length in enumerate(chunk.lengths):
            if length:
                self._append((actor, env), {n: c[begin : begin + length] for n, c in chunk.columns.items()})
            begin += length
        self._chunks += 1
        return self.accepted()

    def add_episode(
        self, *, obs: Any, actions: Any, rewards: Any, dones: Any, truncated: bool = False, **columns: Any
    ) -> None:
        """Add a recorded episode of L actions in Gymnasium's order: actions[t] was taken at obs[t].

        obs: [L + 1, *obs_shape], or [L, ...] where the outcome of the last action was not recorded: that action is
        then dropped. actions: [L, A] in [-1, 1] or one-hot, or [L] integers below A, which become one-hot. rewards,
        dones: [L]; a done may only be the last, and means a true end. truncated: the episode was cut short by a time
        limit. columns: values of the agent's extra columns, the same for all rows (task=3); zeros where not given.
        Raises ValueError before anything is changed.
        """
        if unknown := columns.keys() - self._extra.keys():
            raise ValueError(f"add_episode: {sorted(unknown)} are no extra columns, expected {sorted(self._extra)}.")
        parts = {name: np.asarray(value) for name, value in split_obs(obs).items()}
        recorded = self._episode_columns(parts, np.asarray(actions), np.asarray(rewards), np.asarray(dones))
        if truncated and not recorded["terminated"][-1]:
            recorded["truncated"][-1] = True
        rows = len(recorded["rewards"])
        for name, spec in self._extra.items():
            recorded[name] = np.zeros((rows, *spec.shape), spec.dtype) + np.asarray(columns.get(name, 0), spec.dtype)
        self._check(recorded, rows)
        self._append((RECORDED, 0), recorded)
        if not (recorded["terminated"][-1] or recorded["truncated"][-1]):
            self._columns["truncated"][(self._rows - 1) % self.capacity] = True
            self._episodes += 1

    def _episode_columns(
        self, obs: Mapping[str, Array], actions: Array, rewards: Array, dones: Array
    ) -> dict[str, Array]:
        length = len(actions)
        counts = [len(part) for part in obs.values()]
        rows = counts[0] if len(set(counts)) == 1 else -1
        if not (len(rewards) == len(dones) == length and rows in (length, length + 1) and length >= 1):
            raise ValueError(
                f"add_episode: {' and '.join(map(str, counts))} observations, {length} actions, {len(rewards)} rewards "
                f"and {len(dones)} dones; expected L actions, rewards and dones, and L + 1 observations (or L)."
            )
        if actions.ndim == 1 and actions.dtype.kind in "iu":
            actions = one_hot(actions, self.action_dim)
        if actions.shape != (length, self.action_dim):
            raise ValueError(f"add_episode: actions are {actions.shape}, expected ({length}, {self.action_dim}).")
        if np.any(dones[:-1]):
            raise ValueError(
                f"add_episode: dones[{int(np.argmax(dones))}] is set before the end. Split the data into episodes."
            )
        for name, value in {**obs, "actions": actions, "rewards": rewards}.items():
            if not np.isfinite(value).all():
                raise ValueError(f"add_episode: {name} holds NaN or infinity, expected finite numbers.")
        if np.abs(actions).max() > 1 + 1e-6:
            raise ValueError("add_episode: actions leave [-1, 1]. Rescale them (make_env does it while acting).")
        if rows == length:
            if not self._recorded:
                logger.warning(
                    "add_episode: as many observations as actions, so the outcome of each episode's last action was "
                    "not observed; that action and its reward are dropped. Pass L + 1 observations to keep them."
                )
            actions, rewards, dones = actions[:-1], rewards[:-1], np.zeros(length - 1, bool)
            self._recorded += 1
        none = np.zeros(1, bool)
        return {
            **obs,
            "actions": np.concatenate([np.zeros((1, self.action_dim)), actions]).astype(np.float32),
            "rewards": np.concatenate([[0.0], rewards]).astype(np.float32),
            "is_first": np.arange(rows) == 0,
            "terminated": np.concatenate([none, dones.astype(bool)]),
            "truncated": np.zeros(rows, bool),
        }

    def _check(self, columns: Mapping[str, Array], rows: int) -> None:
        if columns.keys() != self.specs.keys():
            raise ValueError(f"replay got columns {sorted(columns)}, expected {sorted(self.specs)}.")
        for name, spec in self.specs.items():
            if columns[name].shape != (rows, *spec.shape):
                raise ValueError(f"replay column {name!r} is {columns[name].shape}, expected {(rows, *spec.shape)}.")
        if rows > self.capacity:
            raise ValueError(f"{rows} rows at once exceed replay.capacity={self.capacity}. Raise capacity.")

    def _append(self, origin: tuple[int, int], columns: Mapping[str, Array]) -> None:
        """Write consecutive rows of one stream over the oldest rows and link them."""
        count = len(columns["rewards"])
        columns = self._cut_at_seams(origin, columns)
        numbers = np.arange(self._rows, self._rows + count)
        positions = numbers % self.capacity
        if self._rows + count > self.capacity:
            self._index.remove(positions)
        for name, column in columns.items():
            self._columns[name][positions] = column
        self._origin[positions] = origin
        self._next[positions[:-1]] = positions[1:]
        self._next[positions[-1]] = -1
        oldest = self._rows + count - self.capacity
        previous = self._last.get(origin, -1)
        if previous >= max(oldest, self._begin):
            self._next[previous % self.capacity] = positions[0]
        stream = self._streams.setdefault(origin, Stream(self.windows))
        starts, fresh = stream.extend(numbers, columns["is_first"], oldest)
        self._index.add(starts % self.capacity)
        if self.windows.online_queue:
            self._online.extend(fresh.tolist())
        self._last[origin] = int(numbers[-1])
        self._rows += count
        self._steps += int((~columns["is_first"]).sum())
        self._episodes += int((columns["terminated"] | columns["truncated"]).sum())

    def _cut_at_seams(self, origin: tuple[int, int], columns: Mapping[str, Array]) -> Mapping[str, Array]:
        """An episode that stops without an end (its actor died) ends truncated, never terminated."""
        ended, is_first = columns["terminated"] | columns["truncated"], columns["is_first"]
        previous = self._last.get(origin, -1)
        if is_first[0] and previous >= self._oldest:
            self._truncate(previous)
        open_ends = is_first[1:] & ~ended[:-1]
        if not open_ends.any():
            return columns
        truncated = columns["truncated"].copy()
        truncated[:-1] |= open_ends
        return {**columns, "truncated": truncated}

    def _truncate(self, row: int) -> None:
        """End the episode of that row number there, unless it has ended."""
        at = row % self.capacity
        if not (self._columns["terminated"][at] or self._columns["truncated"][at]):
            self._columns["truncated"][at] = True
            self._episodes += 1

    # Out

    def draw(
        self, batch_size: int, seq_len: int | None = None, rng: np.random.Generator | None = None
    ) -> dict[str, Array]:
        """One batch as numpy: every column [B, T, ...] (`as_batch` joins those of a mapping), `continues`, and the
        row numbers `rows`. seq_len: T; None takes that of `windows`. rng: None draws with the buffer's own.

        Raises ValueError where no episode holds seq_len rows.
        """
        if batch_size < 1:
            raise ValueError(f"sample: batch_size is {batch_size}, expected at least 1.")
        length = self.windows.length if seq_len is None else seq_len
        self.check_length(length)
        positions = np.empty((batch_size, length), np.int64)
        positions[:, 0] = self._draw_starts(batch_size, length, rng)
        for t in range(1, length):
            positions[:, t] = self._next[positions[:, t - 1]]
        batch = {name: column.take(positions, axis=0) for name, column in self._columns.items()}
        batch["continues"] = (~batch["terminated"]).astype(np.float32)
        age = (self._rows - 1 - positions) % self.capacity
        batch["rows"] = self._rows - 1 - age
        return batch

    def _draw_starts(self, batch_size: int, length: int, rng: np.random.Generator | None) -> Array:
        """Ring positions [B]: fresh windows first, each once, then uniform."""
        rng = rng or self._rng
        if length != self.windows.length:
            return rng.choice(self._starts_of(length), batch_size)
        fresh: list[int] = []
        while self._online and len(fresh) < batch_size:
            start = self._online.popleft()
            if start >= self._rows - self.capacity:
                fresh.append(start % self.capacity)
        return np.concatenate([np.array(fresh, np.int64), self._index.draw(rng, batch_size - len(fresh))])

    def draw_sequence(self, longest: int, rng: np.random.Generator | None = None) -> dict[str, Array] | None:
        """Columns [T, ...] of one sequence within an episode, of `longest` rows or, where no episode has them, of half,
        a quarter, …; None while no episode has two rows."""
        while longest > 1:
            starts = self._find_starts(longest, crosses=False)
            if len(starts):
                positions = [int((rng or self._rng).choice(starts))]
                while len(positions) < longest:
                    positions.append(int(self._next[positions[-1]]))
                return {name: column[positions] for name, column in self._columns.items()}
            longest //= 2
        return None

    def check_length(self, seq_len: int) -> None:
        """Raises ValueError where no window of that many rows can be drawn."""
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}, expected at least 1.")
        if self._index.count if seq_len == self.windows.length else len(self._starts_of(seq_len)):
            return
        longest = bisect.bisect_left(range(1, len(self) + 1), True, key=lambda n: not len(self._find_starts(n)))
        raise ValueError(
            f"replay holds {len(self)} rows but no complete window of {seq_len}: the longest has {longest}. "
            "Collect more, or shorten the sequences."
        )

    def _starts_of(self, length: int) -> Array:
        """Ring positions that start a window of `length` rows, in order of age; kept until rows arrive."""
        rows, starts = self._lengths.get(length, (-1, np.empty(0, np.int64)))
        if rows != self._rows:
            starts = self._find_starts(length)
            self._lengths[length] = (self._rows, starts)
        return starts

    def _find_starts(self, length: int, crosses: bool | None = None) -> Array:
        """By doubling: `hop` leads 1, 2, 4, … rows ahead, or to -1 where the window would end."""
        live = np.arange(self._oldest, self._rows) % self.capacity
        hop = self._next.copy()
        if not (self.windows.crosses_episodes if crosses is None else crosses):
            hop[(hop >= 0) & self._columns["is_first"][hop]] = -1
        at, left = live, length - 1
        while left:
            if left & 1:
                at = np.where(at >= 0, hop[at], -1)
            hop = np.where(hop >= 0, hop[hop], -1)
            left >>= 1
        return live[at >= 0]

    def sample(
        self,
        batch_size: int,
        seq_len: int | None = None,
        device: torch.device | str = "cpu",
        rng: np.random.Generator | None = None,
    ) -> Batch:
        """One batch as tensors, [B, T, ...]; see `draw` for the arguments and `worldloom.types.Batch`."""
        columns = self.draw(batch_size, seq_len, rng)
        return as_batch({name: torch.from_numpy(column).to(device) for name, column in columns.items()})

    def write_back(self, rows: Array, columns: Mapping[str, Array]) -> int:
        """Replace entries of extra columns at row numbers [B, T]; evicted rows are skipped. Returns how many.

        columns: [B, T', ...], of the last T' rows of each window.
        """
        rows = rows[:, -next(iter(columns.values())).shape[1] :]
        gone = rows < self._rows - self.capacity
        for name, values in columns.items():
            self._columns[name][rows[~gone] % self.capacity] = values[~gone]
        return int(gone.sum())

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Everything but the rows themselves, which `save_rows` writes."""
        return {
            "rows": self._rows,
            "begin": self._oldest,
            "steps": self._steps,
            "episodes": self._episodes,
            "chunks": self._chunks,
            "duplicates": self._duplicates,
            "sequence": [[actor, *last] for actor, last in self._sequence.items()],
            "starts": self._index.starts(),
            "online": list(self._online),
            "rng": self._rng.bit_generator.state,
            "specs": {name: [list(s.shape), s.dtype] for name, s in self.specs.items()},
        }

    @property
    def extra_columns(self) -> list[str]:
        """Names of the columns that an agent declared."""
        return list(self._extra)

    def rows_between(self, begin: int, end: int, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Columns of the rows numbered begin to end, and the stream that each came from; or only `names` of them."""
        positions = np.arange(begin, end) % self.capacity
        if names is not None:
            return {name: self._columns[name][positions] for name in names}
        return {**{n: c[positions] for n, c in self._columns.items()}, "origin": self._origin[positions]}

    def fill_columns(self, columns: Mapping[str, Array]) -> None:
        """Replace whole columns of every row that is held, in order of age: [rows, ...] each."""
        positions = np.arange(self._oldest, self._rows) % self.capacity
        for name, values in columns.items():
            self._columns[name][positions] = values

    def load_state_dict(
        self, state: Mapping[str, Any], segments: Iterable[Mapping[str, Array] | None], rows: int, lost: int = 0
    ) -> None:
        """Restore what `state_dict` gave, from segments of consecutive rows in order, `rows` of them in all.

        None stands for a segment that is lost: its rows (`lost` together) count as evicted, and no window runs over
        the gap. Raises ValueError if the columns differ or rows are missing.
        """
        expected = {name: [list(s.shape), s.dtype] for name, s in self.specs.items()}
        if state["specs"] != expected:
            raise ValueError(f"the checkpoint's replay has columns {state['specs']}, expected {expected}.")
        held = min(state["rows"] - state.get("begin", 0), self.capacity)
        if rows + lost < held:
            raise ValueError(f"the checkpoint holds {rows} rows of replay, expected {held}.")
        self._rows = self._begin = int(state["rows"]) - rows
        seamless: set[tuple[int, int]] | None = None  # streams that need no seam any more after a gap
        for segment in segments:
            if segment is None:
                self._forget_streams()
                seamless = set()
            else:
                self._restore(segment, seamless)
        self._steps, self._episodes = int(state["steps"]), int(state["episodes"])
        self._chunks, self._duplicates = int(state["chunks"]), int(state["duplicates"])
        self._sequence = {actor: (incarnation, sequence) for actor, incarnation, sequence in state["sequence"]}
        order = np.asarray(state["starts"], np.int64)
        if set(order.tolist()) == set(self._index.starts().tolist()):  # the same ring: draw in the same order
            self._index.remove(order)
            self._index.add(order)
        self._online.clear()
        self._online.extend(state["online"] if seamless is None else ())
        self._rng.bit_generator.state = state["rng"]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything into one npz file, whole or not at all; no entry is pickled."""
        final = Path(path)
        begin = self._oldest
        columns = self.rows_between(begin, self._rows) if begin else self._live_columns()
        about = {
            "format": FORMAT,
            "capacity": self.capacity,
            "action_dim": self.action_dim,
            "windows": dataclasses.asdict(self.windows),
            "extra": {name: [list(spec.shape), spec.dtype] for name, spec in self._extra.items()},
            "state": self.state_dict(),
        }
        partial = final.with_name(final.name + ".partial")
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, about=np.frombuffer(pack(about), np.uint8), **columns)
        partial.replace(final)

    def _live_columns(self) -> dict[str, Array]:
        """All rows of a ring that never wrapped, not copied."""
        return {**{n: c[: self._rows] for n, c in self._columns.items()}, "origin": self._origin[: self._rows]}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ReplayBuffer:
        """A buffer as `save` wrote it: the same draws follow. Raises ValueError for a file of another kind, or cut
        short; FileNotFoundError without one."""
        try:
            with np.load(path, allow_pickle=False) as file:
                columns = {name: file[name] for name in file.files}
            about = unpack(columns.pop("about").tobytes())
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is no replay buffer, expected a file that ReplayBuffer.save wrote.") from error
        if about["format"] > FORMAT:
            raise ValueError(f"{path} is of format {about['format']}, expected at most {FORMAT}. Update WorldLoom.")
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
        return buffer

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
        """A buffer filled with recorded episodes, of `worldloom.training.read_episodes`, Minari, or your own.

        trajectories: mappings or objects with observations (or obs), actions, rewards, and terminations (or dones)
        and truncations; see `worldloom.replay.recorded.Episode` for every name that is read. Shapes come from the
        first episode, the number of choices of integer actions from all. action_range: (low, high) of continuous
        actions that are to be scaled to [-1, 1]. capacity: rows; None takes what the episodes fill. options: of
        ReplayBuffer. Raises ValueError, naming the episode.
        """
        episodes = [Episode.read(item, number, action_range) for number, item in enumerate(trajectories)]
        if not episodes:
            raise ValueError("from_trajectories: no episodes were given, expected at least one.")
        shape = obs_shape if obs_shape is not None else episodes[0].obs_shape
        size = action_dim if action_dim is not None else max(episode.action_dim for episode in episodes)
        buffer = cls(capacity or sum(episode.rows for episode in episodes), shape, size, **options)
        for number, episode in enumerate(episodes):
            try:
                buffer.add_episode(**episode.fields())
            except ValueError as error:
                raise ValueError(f"episode {number}: {error}") from error
        return buffer

    def _forget_streams(self) -> None:
        """What follows belongs to no episode that is open."""
        for row in self._last.values():
            if row >= self._oldest:
                self._truncate(row)
        self._last.clear()
        self._streams.clear()

    def _restore(self, segment: Mapping[str, Array], seamless: set[tuple[int, int]] | None) -> None:
        """Append saved rows, one run of a single stream after the other. After a gap, the first row of each stream
        becomes a start: what led to it is lost."""
        origin = segment["origin"]
        cuts = np.flatnonzero((origin[1:] != origin[:-1]).any(1)) + 1
        bounds = [0, *cuts.tolist(), len(origin)]
        for begin, end in pairwise(bounds):
            run = {name: segment[name][begin:end] for name in self.specs}
            stream = (int(origin[begin][0]), int(origin[begin][1]))
            if seamless is not None and stream not in seamless:
                run = {**run, **{name: run[name].copy() for name in ("is_first", "actions", "rewards")}}
                run["is_first"][0], run["actions"][0], run["rewards"][0] = True, 0, 0
                seamless.add(stream)
            self._append(stream, run)


def one_hot(choices: Array, count: int) -> Array:
    """[L, count] float32 of integers [L]. Raises ValueError for integers outside [0, count)."""
    if len(choices) and not (choices.min() >= 0 and choices.max() < count):
        raise ValueError(
            f"add_episode: actions run from {choices.min()} to {choices.max()}, expected integers from 0 to "
            f"{count - 1}: action_dim is the number of choices."
        )
    return np.eye(count, dtype=np.float32)[choices]


def observation_dtypes(shapes: Mapping[str, Any], given: str | Mapping[str, str] | None) -> dict[str, str]:
    """The dtype of each observation column: as given, or by its kind."""
    if isinstance(given, Mapping):
        return split_obs(given)
    return {name: given or ("uint8" if is_image(shape) else "float32") for name, shape in shapes.items()}


def as_batch(columns: Mapping[str, torch.Tensor]) -> Batch:
    """Columns [B, T, ...] as agents read them: the observation joined, where it is a mapping."""
    rest = {name: value for name, value in columns.items() if not name.startswith("obs/")}
    return cast(Batch, {**rest, "obs": join_obs(columns)})


def ring_bytes(capacity: int, specs: Mapping[str, ColumnSpec]) -> int:
    """Bytes of a full ring, its index included."""
    return capacity * (row_bytes(specs) + 8 + 8 + 8 + 8)  # next, origin, start, slot


def check_memory(capacity: int, specs: Mapping[str, ColumnSpec]) -> None:
    """Raises MemoryError if a ring of that capacity exceeds nine tenths of the memory that is free."""
    needed, free = ring_bytes(capacity, specs), available_memory()
    if needed > 0.9 * free:
        fits = int(0.9 * free * capacity / needed)
        raise MemoryError(
            f"replay.capacity={capacity:,} rows needs {needed / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB of memory "
            f"are free. Lower replay.capacity to at most {fits:,}."
        )


def available_memory() -> int:
    """Bytes free for this process: the machine's, or what its control group leaves."""
    free = _meminfo_available()
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, max(int(limit) - used, 0))


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # not Linux: the machine's whole memory
