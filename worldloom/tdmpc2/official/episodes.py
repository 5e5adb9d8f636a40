"""Files of recorded episodes that TD-MPC2's authors published for offline learning of several tasks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from worldloom.archive import UNREADABLE

COLUMNS = {"obs", "action", "reward"}


def read_official_episodes(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the episodes of a file, each as `ReplayBuffer.add_episode` takes it.

    A file is a TensorDict [episodes, T] of obs, action, reward and, with several tasks, task. The action and reward of
    a row led to it; those of row 0 are NaN. The tensordict package is not needed, and nothing in the file is executed;
    its tensors stay on disk until they are read. Raises FileNotFoundError, or ValueError for other files.

        for file in sorted(Path("mt30").glob("*.pt")):
            for episode in read_official_episodes(file):
                replay.add_episode(**episode)
    """
    columns = _read(path)
    episodes, rows = columns["reward"].shape[:2]
    for index in range(episodes):
        row = {name: column[index] for name, column in columns.items()}
        ends = row.get("terminated", torch.zeros(rows)) > 0.5
        episode = {
            "obs": row["obs"].float().numpy(),
            "actions": row["action"][1:].float().numpy(),
            "rewards": row["reward"][1:].float().reshape(rows - 1).numpy(),
            "dones": ends[1:].reshape(rows - 1).numpy(),
            "truncated": True,
        }
        if "task" in row:
            episode["task"] = int(row["task"].reshape(-1)[0])
        yield episode


def _read(path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist, expected a .pt file of episodes.")
    known: list[Any] = [(_rebuild, "tensordict._reductions._make_td")]
    known += [(_TensorDict, f"tensordict.{module}TensorDict") for module in ("_td.", "tensordict.", "")]
    try:
        with torch.serialization.safe_globals(known):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is no file of episodes that can be read safely: {reason}") from error
    columns = getattr(found, "columns", found)
    if not isinstance(columns, Mapping) or not columns.keys() >= COLUMNS:
        holds = sorted(columns) if isinstance(columns, Mapping) else type(columns).__name__
        raise ValueError(f"{path} holds {holds}, expected a TensorDict of {sorted(COLUMNS)} [episodes, T, ...].")
    columns = {name: value for name, value in columns.items() if isinstance(value, Tensor)}
    lead = tuple(columns["reward"].shape[:2])
    if len(lead) != 2 or lead[1] < 2 or any(tuple(column.shape[:2]) != lead for column in columns.values()):
        shapes = {name: tuple(column.shape) for name, column in columns.items()}
        raise ValueError(f"{path} holds {shapes}, expected [episodes, T, ...] of one length T of at least 2.")
    return columns


class _TensorDict:
    """The stand-in for a TensorDict: its entries."""

    columns: Mapping[str, Any]

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.columns = state.get("_tensordict", {})


def _rebuild(kind: type[_TensorDict], state: Mapping[str, Any]) -> _TensorDict:
    read = kind()
    read.__setstate__(state)
    return read
