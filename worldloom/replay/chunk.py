"""A chunk: the rows that one actor's environments produced in one call of `collect`, ready for replay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from worldloom.types import Array, ColumnSpec, is_image, split_obs

FLAGS = ("is_first", "terminated", "truncated")
LIFE_LOST = {"life_lost": ColumnSpec((), "bool")}  # a further column, of environments that mark lost lives


class ChunkKey(NamedTuple):
    """Identifies a chunk, so that replay ignores one that is inserted twice."""

    actor: int
    incarnation: int  # how often the actor was started
    sequence: int


@dataclass(frozen=True)
class ChunkInfo:
    """Facts about a chunk, small enough to be sent without the rows."""

    key: ChunkKey
    steps: int  # environment steps: rows that an action led to
    version: int | None  # of the weights that acted; None where actions were drawn at random
    returns: tuple[float, ...]  # of the episodes that ended here
    episode_lengths: tuple[int, ...]  # their agent steps
    true_ends: int  # how many of them ended terminated
    failures: int  # environments rebuilt here after an error
    last_failure: str  # the newest such error, empty if there was none yet
    seconds: float  # spent collecting
    waited: float  # of these, spent waiting for actions
    acting_lost: str  # why the backend gave no more actions, empty if it always did


@dataclass(frozen=True)
class Chunk:
    """R rows of E environments, one environment after the other; the time alignment is that of `worldloom.types`."""

    columns: dict[str, Array]  # name -> [R, ...]
    lengths: tuple[int, ...]  # rows of each environment, E numbers that sum to R
    info: ChunkInfo


class Ledger:
    """Records the chunks that arrived. A key that is not newer than the last one of its actor is a duplicate."""

    def __init__(self) -> None:
        self.chunks = self.duplicates = 0
        self.newest: dict[int, tuple[int, int]] = {}  # actor -> last (incarnation, sequence)

    def follows(self, key: ChunkKey) -> bool:
        """Return whether no chunk is missing before this one; the first one of an incarnation has number 0."""
        incarnation, sequence = self.newest.get(key.actor, (-1, -1))
        return key.sequence == (sequence + 1 if key.incarnation == incarnation else 0)

    def admit(self, key: ChunkKey) -> bool:
        """Count a chunk; return False for a duplicate."""
        actor, incarnation, sequence = key
        newest = self.newest.get(actor)
        if newest is not None and (incarnation, sequence) <= newest:
            self.duplicates += 1
            return False
        self.newest[actor] = (incarnation, sequence)
        self.chunks += 1
        return True


def with_seam(columns: Mapping[str, Array]) -> dict[str, Array]:
    """Return columns [R, ...] whose first row starts an episode, since what led to it is lost."""
    changed = {name: columns[name].copy() for name in ("is_first", "actions", "rewards")}
    changed["is_first"][0], changed["actions"][0], changed["rewards"][0] = True, 0, 0
    return {**columns, **changed}


def base_columns(observations: Mapping[str, ColumnSpec], action_dim: int) -> dict[str, ColumnSpec]:
    """Return the columns that every replay has; `observations` are named as by `worldloom.types.split_obs`."""
    return {
        **observations,
        "actions": ColumnSpec((action_dim,), "float32"),
        "rewards": ColumnSpec((), "float32"),
        **{flag: ColumnSpec((), "bool") for flag in FLAGS},
    }


def observation_dtypes(shapes: Mapping[str, Any], given: str | Mapping[str, str] | None) -> dict[str, str]:
    """Return the dtype of each observation column: as given, else uint8 for images and float32 for others."""
    if isinstance(given, Mapping):
        return split_obs(given)
    return {name: given or ("uint8" if is_image(shape) else "float32") for name, shape in shapes.items()}


def row_bytes(columns: Mapping[str, ColumnSpec]) -> int:
    return sum(math.prod(c.shape) * np.dtype(c.dtype).itemsize for c in columns.values())


class ChunkBuilder:
    """Collects rows of E environments, each at its own pace, into preallocated columns."""

    def __init__(self, columns: dict[str, ColumnSpec], num_envs: int, rows: int) -> None:
        self._columns = {
            name: np.empty((num_envs, rows, *column.shape), column.dtype) for name, column in columns.items()
        }
        self._count = np.zeros(num_envs, np.int64)

    def append(self, envs: Array, **values: Array) -> None:
        """Append one row for each environment in `envs` [E'] (indices); values are [E', ...], zeros if not given."""
        at = self._count[envs]
        for name, column in self._columns.items():
            column[envs, at] = values.get(name, 0)
        self._count[envs] += 1

    def columns(self) -> dict[str, Array]:
        """Return name -> [R, ...], one environment after the other."""
        return {
            name: np.concatenate([rows[:count] for rows, count in zip(column, self._count, strict=True)])
            for name, column in self._columns.items()
        }

    def lengths(self) -> tuple[int, ...]:
        return tuple(int(count) for count in self._count)
