"""Checks of what callers give: devices, shapes of observations, batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from worldloom.types import Batch, ObsShape

SMALLEST_IMAGE = 16  # sides of images from which a last axis of a few entries is taken for channels
MOST_CHANNELS = 4  # of one frame
PARTS = {"obs": "[B, T, …]", "actions": "[B, T, A]", "rewards": "[B, T]"}  # that every batch must have


def usable(device: torch.device | str, name: str = "device") -> torch.device:
    """Return a device that works here. Raises ValueError, which calls it `name`, for any other."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(f"{name} is {str(device)!r}, which cannot be used here: {why}. Use cpu.") from error
    return found


def channel_first(obs_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]]) -> ObsShape:
    """Return the shape as tuples. Raises ValueError for an image whose channels are its last axis."""
    if isinstance(obs_shape, Mapping):
        return {key: _channel_first(tuple(shape), f"obs_shape[{key!r}]") for key, shape in obs_shape.items()}
    return _channel_first(tuple(obs_shape), "obs_shape")


def _channel_first(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    if len(shape) == 3 and min(shape[:2]) >= SMALLEST_IMAGE:
        height, width, last = shape
        if last <= MOST_CHANNELS or height == width > last:
            raise ValueError(
                f"{name} is {shape}, which has its channels last. Expected channel-first images: {name}="
                f"{(last, height, width)}, and observations transposed like that, as in obs.transpose(2, 0, 1)."
            )
    return shape


def check_batch(batch: Any) -> None:
    """Raise ValueError for a batch without a part that every loss needs, TypeError for what is no mapping."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"the batch is a {type(batch).__name__}, expected a mapping with {', '.join(PARTS)}.")
    if lacking := [f"{name} {shape}" for name, shape in PARTS.items() if name not in batch]:
        raise ValueError(
            f"the batch lacks {' and '.join(lacking)}; it holds {', '.join(map(str, batch)) or 'nothing'}. "
            "ReplayBuffer.sample makes such batches; worldloom.types.Batch describes them."
        )


def check_action(where: str, action: Tensor, expected: tuple[int, ...]) -> None:
    """Raise ValueError, which names the caller, for actions of another shape."""
    if tuple(action.shape) != expected:
        raise ValueError(f"{where}: actions are {tuple(action.shape)}, expected {expected}.")


def check_act_state(act_state: Mapping[str, Tensor], envs: int) -> None:
    """Raise ValueError for an act_state of another number of environments."""
    rows = len(next(iter(act_state.values())))
    if rows != envs:
        raise ValueError(
            f"act: act_state has {rows} rows and obs {envs}. Keep one act_state for each vector of environments."
        )


@dataclass(frozen=True)
class Steps:
    """Holds a batch without its observations, all float32 but `is_first`; flags that it lacked are False."""

    actions: Tensor  # [B, T, A]
    rewards: Tensor  # [B, T]
    is_first: Tensor  # [B, T] bool
    terminated: Tensor  # [B, T]


def read_steps(batch: Batch, obs: Mapping[str, Tensor], action_dim: int) -> Steps:
    """Return the steps of a batch. Raises ValueError that names a part of another shape than [B, T] or [B, T, A].

    obs: the batch's observations by key, of which only [B, T] is checked.
    """
    lead = (batch["actions"].shape[0], batch["actions"].shape[1])
    for name, value in obs.items():
        if tuple(value.shape[:2]) != lead:
            raise ValueError(f"batch: obs {name!r} is {tuple(value.shape)} and actions [{lead[0]}, {lead[1]}, A].")
    check_action("batch['actions']", batch["actions"], (*lead, action_dim))
    rewards = batch["rewards"]
    if tuple(rewards.shape) != lead:
        raise ValueError(f"batch['rewards'] is {tuple(rewards.shape)}, expected {lead}.")
    is_first = batch.get("is_first", torch.zeros_like(rewards, dtype=torch.bool)).bool()
    if "terminated" in batch:
        terminated = batch["terminated"].float()
    else:
        terminated = 1 - batch["continues"] if "continues" in batch else torch.zeros_like(rewards)
    for name, value in (("is_first", is_first), ("terminated", terminated)):
        if tuple(value.shape) != lead:
            raise ValueError(f"batch[{name!r}] is {tuple(value.shape)}, expected {lead}.")
    return Steps(batch["actions"].float(), rewards.float(), is_first, terminated)
