"""Checks of what callers give: devices, shapes of observations, batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from worldloom.types import ObsShape

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
