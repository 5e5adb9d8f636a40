"""Files of recorded episodes that TD-MPC2's authors published for offline learning of several tasks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from worldloom.tdmpc2.official.tensors import Named, TensorFile, listed

COLUMNS = ("action", "obs", "reward")
OPTIONAL = ("task", "terminated")
ONE_NUMBER = ("reward", "task", "terminated")  # [episodes, T] or [episodes, T, 1]
TENSOR_DICTS = tuple(f"tensordict.{name}TensorDict" for name in ("_td.", "tensordict.", ""))  # over the years


def read_official_episodes(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the episodes of a file, each as `ReplayBuffer.add_episode` takes it.

    A file is a TensorDict [episodes, T] of obs, action, reward and, with several tasks, task. The action and reward of
    a row led to it; those of row 0 are NaN. The tensordict package is not needed, and nothing in the file is executed;
    its tensors stay on disk until they are read. Raises FileNotFoundError, or ValueError for other files and for
    episodes with numbers that are not finite.

        for file in sorted(Path("mt30").glob("*.pt")):
            for episode in read_official_episodes(file):
                replay.add_episode(**episode)
    """
    columns = _read(path)
    episodes, rows = columns["reward"].shape[:2]
    for index in range(episodes):
        row = {name: column[index].float() for name, column in columns.items()}
        led = {name: row[name][1:] for name in ("action", "reward", "terminated") if name in row}
        for name, values in (row | led).items():
            if not values.isfinite().all():
                raise ValueError(f"{path}: {name} of episode {index} holds NaN or infinity, expected finite numbers.")
        ends = led.get("terminated", torch.zeros(rows - 1)) > 0.5
        episode = {
            "obs": row["obs"].numpy(),
            "actions": led["action"].numpy(),
            "rewards": led["reward"].reshape(rows - 1).numpy(),
            "dones": ends.reshape(rows - 1).numpy(),
            "truncated": True,
        }
        if "task" in row:
            task = row["task"].flatten()[0].item()
            if task < 0 or task % 1 or (row["task"] != task).any():
                raise ValueError(f"{path}: task of episode {index} is not one number from 0 in all rows.")
            episode["task"] = int(task)
        yield episode


def _read(path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist, expected a .pt file of episodes.")
    file = TensorFile(path, "no file of episodes that can be read safely")
    found = _entries(file.content)
    if not isinstance(found, dict) or not all(name in found for name in COLUMNS):
        holds = listed(name for name in found if isinstance(name, str)) if isinstance(found, dict) else _kind(found)
        raise ValueError(f"{path} holds {holds}, expected a TensorDict of {listed(COLUMNS)} [episodes, T, ...].")
    columns = file.tensors({name: found[name] for name in (*COLUMNS, *OPTIONAL) if name in found})
    for name, column in columns.items():
        if name in COLUMNS and not (column.is_floating_point() or (name == "obs" and column.dtype == torch.uint8)):
            raise ValueError(f"{path}: {name} is {column.dtype}, expected floats. Check where the file comes from.")
    lead = tuple(columns["reward"].shape[:2])
    if len(lead) != 2 or lead[1] < 2 or not all(_fits(name, column, lead) for name, column in columns.items()):
        shapes = {name: tuple(column.shape) for name, column in columns.items()}
        raise ValueError(f"{path} holds {shapes}, expected [episodes, T, ...] of one length T of at least 2.")
    return columns


def _entries(content: Any) -> Any:
    """Return the entries of a TensorDict, which is made by a call or by its state, or the content itself."""
    if not isinstance(content, Named) or _kind(content) not in ("tensordict._reductions._make_td", *TENSOR_DICTS):
        return content
    state = content.state or content.args[-1:]  # (state, slots) in some versions; else the last argument of the call
    state = state[0] if isinstance(state, tuple) and state else state
    return state.get("_tensordict") if isinstance(state, dict) else None


def _fits(name: str, column: Tensor, lead: tuple[int, ...]) -> bool:
    """Return whether a column [episodes, T, ...] has the axes of its kind."""
    rest = tuple(column.shape[2:])
    if column.shape[:2] != lead:
        return False
    if name in ONE_NUMBER:
        return rest in ((), (1,))
    return len(rest) == 1 if name == "action" else len(rest) >= 1


def _kind(found: Any) -> str:
    return type(found).__name__[:80]
