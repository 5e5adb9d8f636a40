"""Recorded episodes from other sources: Minari and Gymnasium style, D4RL's flat files, HDF5 and npz."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.archive import UNREADABLE, explain
from worldloom.extras import how_to_install
from worldloom.replay.lerobot import holds_lerobot, read_lerobot
from worldloom.replay.minari import holds_minari, read_minari
from worldloom.types import Array, ColumnSpec, ObsShape

NAMES: dict[str, tuple[str, ...]] = {
    "obs": ("obs", "observations", "observation"),
    "actions": ("actions", "action"),
    "rewards": ("rewards", "reward"),
    "dones": ("terminations", "terminated", "terminals", "dones"),
    "truncated": ("truncations", "truncated", "timeouts"),
}
EPISODE = re.compile(r"episode_\d+")
NEXT_OBS = ("next_observations", "next_obs")
LAST_ACTION_DROPPED = (
    "add_episode: there are as many observations as actions, so the observation after the last action of each episode "
    "is missing; that action and its reward are dropped. Pass L + 1 observations to keep them."
)


@dataclass(frozen=True)
class Episode:
    """L actions in Gymnasium's order; obs [L + 1, …] (or L), or a mapping of such; rewards and dones [L]."""

    obs: Any
    actions: Array
    rewards: Array
    dones: Array
    truncated: bool

    @classmethod
    def read(cls, item: Any, number: int = 0, action_range: tuple[Any, Any] | None = None) -> Episode:
        """Read a mapping or an object, by the names in NAMES; dones and truncated may be one flag or one per step.

        Raises ValueError for a missing entry, naming the episode by its number.
        """
        obs, actions, rewards = (_entry(item, part, number) for part in ("obs", "actions", "rewards"))
        actions, rewards = np.asarray(actions), np.asarray(rewards).reshape(-1)
        if action_range is not None:
            low, high = (np.asarray(bound, np.float32) for bound in action_range)
            if not np.all(low < high):
                raise ValueError(f"action_range is {action_range}, expected low < high.")
            actions = (2 * (actions - low) / (high - low) - 1).astype(np.float32)
        length = len(actions)
        dones = _flags(_entry(item, "dones", number), length)
        truncated = bool(_flags(_entry(item, "truncated", number, False), length)[-1:].any())
        return cls(_arrays(obs), actions, rewards, dones, truncated)

    @property
    def rows(self) -> int:
        return 1 + len(self.actions)

    @property
    def obs_shape(self) -> ObsShape:
        if isinstance(self.obs, Mapping):
            return {name: part.shape[1:] for name, part in self.obs.items()}
        shape: tuple[int, ...] = self.obs.shape[1:]
        return shape

    @property
    def action_dim(self) -> int:
        """Width of actions [L, A]; for integers [L], the largest plus one."""
        return int(self.actions.max()) + 1 if self.actions.ndim == 1 else self.actions.shape[1]

    def fields(self) -> dict[str, Any]:
        """Return the arguments of `ReplayBuffer.add_episode`."""
        return dict(vars(self))


def read_trajectories(trajectories: Iterable[Any], action_range: tuple[Any, Any] | None) -> list[Episode]:
    """Read all episodes. Raises ValueError if there is none, or one lacks an entry."""
    episodes = [Episode.read(item, number, action_range) for number, item in enumerate(trajectories)]
    if not episodes:
        raise ValueError("from_trajectories: no episodes were given, expected at least one.")
    return episodes


def read_episodes(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the episodes of an npz or HDF5 file, or of a directory: a Minari or LeRobot dataset, or npz files in order.

    A file may hold the arrays of one episode; the arrays of many, cut where a step is terminal or timed out (the last
    observations are among the others, or in D4RL's next_observations); or HDF5 groups episode_0, …, as they are.
    Datasets are read as `read_minari` and `read_lerobot` read them. All but npz needs packages of worldloom[data].
    Raises ValueError for other files, FileNotFoundError if `path` does not exist.
    """
    found = Path(path)
    if not found.exists():
        raise FileNotFoundError(f"{path} does not exist, expected a file or directory of recorded episodes.")
    if found.is_dir():
        files = sorted(found.glob("*.npz"))
        if not files and holds_lerobot(found):
            yield from read_lerobot(found)
        elif not files and holds_minari(found):
            yield from read_minari(found)
        elif not files:
            raise ValueError(
                f"{path} holds no .npz file, expected one for each episode, or a dataset of Minari or LeRobot."
            )
        for file in files:
            yield from read_episodes(file)
    elif found.suffix == ".npz":
        try:
            if not zipfile.is_zipfile(found):
                raise ValueError("it is no zip file, or is cut short")
            with np.load(found, allow_pickle=False) as archive:
                columns = {name: archive[name] for name in archive.files}
        except UNREADABLE as error:
            raise ValueError(
                f"{path} cannot be read: {explain(error)}. Expected an npz file of plain arrays. Save it again."
            ) from error
        yield from _split(columns, str(path))
    elif found.suffix in (".hdf5", ".h5"):
        yield from _read_hdf5(found)
    else:
        raise ValueError(f"{path} ends in {found.suffix!r}, expected .npz, .hdf5, .h5 or a directory of .npz files.")


def _read_hdf5(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import h5py
    except ImportError:
        raise ImportError(f"{path} is an HDF5 file, but {how_to_install('h5py')}") from None
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}. Expected an HDF5 file.") from error
    with file:
        groups = [name for name, node in file.items() if EPISODE.fullmatch(name) and isinstance(node, h5py.Group)]
        for name in sorted(groups, key=lambda name: int(name.removeprefix("episode_"))):
            yield {key: _tree(value) for key, value in file[name].items() if key != "infos"}
        if not groups:
            yield from _split({k: np.asarray(v) for k, v in file.items() if isinstance(v, h5py.Dataset)}, str(path))


def _tree(node: Any) -> Any:
    """Return a dataset as an array, a group (a mapping of observations) as a dict of arrays."""
    return {key: _tree(value) for key, value in node.items()} if hasattr(node, "items") else np.asarray(node)


def _split(columns: Mapping[str, Array], source: str) -> Iterator[dict[str, Any]]:
    """Yield one episode, or many, each cut after the step that ended it."""
    found = {part: next((columns[n] for n in names if n in columns), None) for part, names in NAMES.items()}
    obs, actions, rewards = found["obs"], found["actions"], found["rewards"]
    if obs is None or actions is None or rewards is None:
        raise ValueError(
            f"{source} holds {sorted(columns)}, expected at least observations, actions and rewards (or obs, …)."
        )
    obs, actions, rewards = np.atleast_1d(obs), np.atleast_1d(actions), np.atleast_1d(rewards)
    count = len(actions)
    none = np.zeros(count, bool)
    dones = none if found["dones"] is None else _flags(found["dones"], count)
    timeouts = none if found["truncated"] is None else _flags(found["truncated"], count)
    following = next((columns[name] for name in NEXT_OBS if name in columns), None)
    steps = {"rewards": rewards, "ends": dones, "timeouts": timeouts, "next observations": following}
    counts = {part: len(array) for part, array in steps.items() if array is not None}
    if not count or set(counts.values()) != {count}:
        told = ", ".join(f"{part}: {n}" for part, n in counts.items())
        raise ValueError(f"{source} holds actions: {count}, {told}. Expected as many of each, and at least one.")
    cuts = [0, *(np.flatnonzero((dones | timeouts)[:-1]) + 1).tolist(), count]
    seen, episodes = len(obs), len(cuts) - 1
    if seen not in (count, count + 1, count + episodes):
        raise ValueError(
            f"{source} holds observations: {seen}, actions: {count}, episodes: {episodes}. Expected {count} "
            f"observations, or one more for each episode: {count + episodes}."
        )
    last = int(seen == count + episodes)  # observations that an episode has after its last action
    for number, (begin, end) in enumerate(pairwise(cuts)):
        seen_here = obs[begin + last * number : end + last * (number + 1)]
        if following is not None and not last:
            seen_here = np.concatenate([seen_here, following[end - 1 : end]])
        yield {
            "observations": seen_here,
            "actions": actions[begin:end],
            "rewards": rewards[begin:end],
            "terminations": dones[begin:end],
            "truncations": timeouts[begin:end],
        }


def _entry(item: Any, part: str, number: int, default: Any = None) -> Any:
    for name in NAMES[part]:
        value = item.get(name) if isinstance(item, Mapping) else getattr(item, name, None)
        if value is not None:
            return value
    if default is None:
        raise ValueError(f"episode {number} has no {part}, expected one of {', '.join(NAMES[part])}.")
    return default


def _flags(value: Any, length: int) -> Array:
    """Return flags [L]; a single flag is that of the last step."""
    flags = np.asarray(value).astype(bool)
    if flags.ndim == 0:
        flags = np.arange(length) == length - 1 if flags else np.zeros(length, bool)
    return flags.reshape(-1)


def _arrays(obs: Any) -> Any:
    if isinstance(obs, Mapping):
        return {name: np.asarray(part) for name, part in obs.items()}
    return np.asarray(obs)


def episode_columns(
    obs: Mapping[str, Array], actions: Array, rewards: Array, dones: Array, action_dim: int
) -> dict[str, Array]:
    """Convert an episode in Gymnasium's order to replay rows; see `ReplayBuffer.add_episode`.

    If the last observation is missing, the last action is dropped. An episode without a true end ends truncated.
    Raises ValueError for arrays that are not such an episode.
    """
    length = len(actions)
    counts = [len(part) for part in obs.values()]
    rows = counts[0] if len(set(counts)) == 1 else -1
    if not (len(rewards) == len(dones) == length and rows in (length, length + 1) and length >= 1):
        raise ValueError(
            f"add_episode: {' and '.join(map(str, counts))} observations, {length} actions, {len(rewards)} rewards "
            f"and {len(dones)} dones; expected L actions, rewards and dones, and L + 1 observations (or L)."
        )
    if actions.ndim == 1 and actions.dtype.kind in "iu":
        actions = one_hot(actions, action_dim)
    if actions.shape != (length, action_dim):
        raise ValueError(f"add_episode: actions are {actions.shape}, expected ({length}, {action_dim}).")
    if np.any(dones[:-1]):
        raise ValueError(
            f"add_episode: dones[{int(np.argmax(dones))}] is set before the end. Split the data into episodes."
        )
    for name, value in {**obs, "actions": actions, "rewards": rewards}.items():
        if not _fits_float32(value):
            raise ValueError(f"add_episode: {name} holds NaN or infinity (in float32), expected finite numbers.")
    if np.abs(actions).max() > 1 + 1e-6:
        raise ValueError("add_episode: actions leave [-1, 1]. Rescale them (make_env does it while acting).")
    if rows == length:
        actions, rewards, dones = actions[:-1], rewards[:-1], np.zeros(length - 1, bool)
    terminated = np.concatenate([np.zeros(1, bool), dones.astype(bool)])
    return {
        **obs,
        "actions": np.concatenate([np.zeros((1, action_dim)), actions]).astype(np.float32),
        "rewards": np.concatenate([[0.0], rewards]).astype(np.float32),
        "is_first": np.arange(rows) == 0,
        "terminated": terminated,
        "truncated": (np.arange(rows) == rows - 1) & ~terminated,
    }


def constant_columns(specs: Mapping[str, ColumnSpec], values: Mapping[str, Any], rows: int) -> dict[str, Array]:
    """Return columns that hold one value in every row; zero if none is given."""
    return {
        name: np.zeros((rows, *spec.shape), spec.dtype) + np.asarray(values.get(name, 0), spec.dtype)
        for name, spec in specs.items()
    }


def one_hot(choices: Array, count: int) -> Array:
    """Convert integers [L] to one-hot [L, count] float32. Raises ValueError for integers outside [0, count)."""
    if len(choices) and not (choices.min() >= 0 and choices.max() < count):
        raise ValueError(
            f"add_episode: actions run from {choices.min()} to {choices.max()}, expected integers from 0 to "
            f"{count - 1}: action_dim is the number of choices."
        )
    return np.eye(count, dtype=np.float32)[choices]


def _fits_float32(value: Array) -> bool:
    """Return whether all numbers are finite as replay keeps them."""
    numbers = np.asarray(value)
    return numbers.dtype.kind != "f" or bool((np.abs(numbers) <= np.finfo(np.float32).max).all())
