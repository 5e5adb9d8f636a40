"""Episodes of Minari's datasets, read by the Minari library and converted as their environments are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.archive import UNREADABLE, explain
from worldloom.extras import how_to_install
from worldloom.spaces import ActionCodec, ObservationCodec
from worldloom.types import Array

METADATA = ("metadata.json", "data/metadata.json")  # in the folder that Minari reads, or in the one above it
SPACES = ("observation_space", "action_space")


def read_minari(dataset: Any) -> Iterator[dict[str, Any]]:
    """Yield the episodes of a Minari dataset in order, each as `ReplayBuffer.from_trajectories` takes it.

    dataset: a `minari.MinariDataset` (such as `minari.load_dataset(id)`), of which only the chosen episodes are read,
    or a dataset's directory. Observations and actions come as an agent meets them in the same environment:
    observations [L + 1, …], images channel-first uint8, other numbers flat float32, choices class indices, or a
    mapping of these; actions [L, A] float32, scaled from the action space's bounds to [-1, 1], or one-hot; rewards,
    terminations and truncations [L]. Source: "Dataset Standards" in the documentation of Minari 0.5.

    Needs minari, from worldloom[data]. Raises FileNotFoundError if the directory does not exist, ValueError if it is no
    dataset of Minari or is damaged, naming the episode, and TypeError for spaces that no agent takes (Text, Tuple).
    """
    source, opened = _open(dataset)
    observe = ObservationCodec(source, opened.observation_space)
    act = ActionCodec(source, opened.action_space)
    episodes = _episodes(opened)
    for number in range(len(opened.episode_indices)):
        try:
            episode = _converted(next(episodes), observe, act)
        except (*UNREADABLE, AssertionError, StopIteration) as error:
            what = explain(error) if isinstance(error, UNREADABLE) else "it is missing or of another shape"
            raise ValueError(f"{source}: episode {number} cannot be read: {what}. Get the dataset anew.") from error
        yield episode


def holds_minari(directory: Path) -> bool:
    """Return whether a directory looks like a dataset of Minari."""
    return any((directory / name).is_file() for name in METADATA)


def _open(dataset: Any) -> tuple[str, Any]:
    """Return what to call the dataset, and its `minari.MinariDataset`."""
    if not isinstance(dataset, (str, os.PathLike)):
        return f"dataset {dataset.id}", dataset
    try:
        import minari
    except ImportError:
        raise ImportError(f"{dataset} is a dataset of Minari, but {how_to_install('minari')}") from None
    root = Path(dataset)
    if not root.is_dir():
        raise FileNotFoundError(f"{dataset} does not exist, expected the directory of a Minari dataset.")
    found = next((root / name for name in METADATA if (root / name).is_file()), None)
    if found is None:
        raise ValueError(f"{dataset} is no dataset of Minari: it has no {METADATA[1]}.")
    try:
        metadata = json.loads(found.read_text())
        missing = [name for name in SPACES if not isinstance(metadata.get(name), str)]
        if missing:  # Minari would make the environment that the file names, which runs code of the file's choice
            raise ValueError(f"it has no {' and no '.join(missing)}")
        return str(dataset), minari.MinariDataset(found.parent)
    except (*UNREADABLE, AssertionError, NotImplementedError) as error:
        raise ValueError(f"{found} is no metadata of a Minari dataset, or is damaged: {explain(error)}.") from error


def _episodes(opened: Any) -> Iterator[Any]:
    """Yield what Minari reads; as a generator, it opens the files when the first episode is asked for."""
    yield from opened.iterate_episodes()


def _converted(episode: Any, observe: ObservationCodec, act: ActionCodec) -> dict[str, Any]:
    length, obs = len(episode.rewards), episode.observations
    mapping = isinstance(obs, dict)
    counts = {key: len(part) for key, part in obs.items()} if mapping else {"observations": len(obs)}
    counts["actions"] = len(episode.actions) + 1
    for key, count in counts.items():
        if count != length + 1:
            raise ValueError(f"{key} has {count - (key == 'actions')} entries beside {length} rewards")
    seen = [observe({k: part[t] for k, part in obs.items()} if mapping else obs[t]) for t in range(length + 1)]
    return {
        "observations": _stacked(seen),
        "actions": act.rows(episode.actions),
        "rewards": np.asarray(episode.rewards),
        "terminations": np.asarray(episode.terminations),
        "truncations": np.asarray(episode.truncations),
    }


def _stacked(seen: list[Any]) -> dict[str, Array] | Array:
    if isinstance(seen[0], dict):
        return {key: np.stack([obs[key] for obs in seen]) for key in seen[0]}
    return np.stack(seen)
