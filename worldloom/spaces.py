"""All conversions between Gymnasium's spaces and WorldLoom's arrays."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor

from worldloom.types import Array, ColumnSpec, ObsArray, ObsShape, is_image, join_obs, split_obs

MAPPINGS_HINT = "Wrap it (gymnasium.wrappers.FlattenObservation turns nested spaces into vectors)."


class ObservationEntry:
    """A converter of one observation: images to channel-first uint8 [C, H, W], other numbers to float32 vectors [V],
    choices to class indices, int32.

    space: that of the result. image_size: side of the squares that images are resized to. Raises TypeError for spaces
    that are none of these.
    """

    def __init__(self, owner: str, space: spaces.Space[Any], image_size: int | None = None) -> None:
        self._owner, self._side = owner, image_size
        self._start: Array = np.zeros((), np.int32)
        self._channels_last = False
        self.classes = 0  # classes of each entry; 0 for numbers and images
        self._raw_shape: tuple[int, ...] = space.shape or ()
        self.space: spaces.Space[Any]
        if isinstance(space, spaces.Box) and is_image(space.shape) and space.dtype == np.uint8:
            self._channels_last = _channels_last(*space.shape)
            channels, height, width = np.roll(space.shape, 1) if self._channels_last else space.shape
            if (height, width) == (image_size, image_size):
                self._side = None  # needs no resizing
            sides = (image_size, image_size) if image_size else (int(height), int(width))
            self.space = spaces.Box(0, 255, (int(channels), *sides), np.uint8)
        elif isinstance(space, spaces.Box):
            self.space = spaces.Box(-np.inf, np.inf, (int(np.prod(space.shape)),), np.float32)
        elif isinstance(space, spaces.Discrete):
            self.classes, self._start = int(space.n), np.asarray(space.start, np.int32)
            self.space = spaces.Discrete(self.classes)
        elif isinstance(space, spaces.MultiDiscrete):
            self.classes = int(np.max(space.nvec))  # all entries of one observation share the count
            self._start = np.asarray(space.start, np.int32).reshape(-1)
            self.space = spaces.MultiDiscrete([self.classes] * int(np.prod(self._raw_shape)))
        elif isinstance(space, spaces.MultiBinary):
            self.classes = 2
            self.space = spaces.MultiDiscrete([2] * int(np.prod(self._raw_shape)))
        else:
            raise TypeError(f"{owner} is {space}, expected numbers, images or class indices. {MAPPINGS_HINT}")

    @property
    def column(self) -> ColumnSpec:
        """The replay column of this observation."""
        return ColumnSpec(self.space.shape or (), "int32" if self.classes else str(self.space.dtype))

    def __call__(self, obs: Any) -> Array:
        """Convert one observation. Raises ValueError for another shape, an unknown class, NaN or infinity."""
        array = np.asarray(obs)
        if array.shape != self._raw_shape:
            raise ValueError(f"{self._owner} came with shape {array.shape}, expected {self._raw_shape}.")
        if self.space.dtype == np.uint8:
            image = np.ascontiguousarray(np.moveaxis(array, -1, 0) if self._channels_last else array, np.uint8)
            return resize_image(image, self._side) if self._side else image
        if self.classes:
            indices = array.reshape(self.space.shape or ()).astype(np.int32) - self._start
            if (indices < 0).any() or (indices >= self.classes).any():
                raise ValueError(f"{self._owner} came as {array}, expected one of {self.classes} classes.")
            return np.asarray(indices, np.int32)
        vector = array.astype(np.float32).reshape(-1)
        if not np.isfinite(vector).all():
            raise ValueError(
                f"{self._owner} came with NaN or infinity at entries "
                f"{np.flatnonzero(~np.isfinite(vector))[:8].tolist()}, expected finite numbers. Check the simulation."
            )
        return vector


def resize_image(image: Array, side: int, area: bool = False) -> Array:
    """Resize [C, H, W] uint8 to [C, side, side] uint8: bilinear with antialiasing or, by `area`, to means of the pixels
    that a new one covers, in proportion to how much of each it covers."""
    pixels = torch.from_numpy(image).float()
    if area:
        rows, columns = (coverage(size, side) for size in image.shape[1:])
        resized = rows @ pixels @ columns.mT
    else:
        resized = F.interpolate(pixels[None], (side, side), mode="bilinear", antialias=True)[0]
    return resized.round().clamp(0, 255).to(torch.uint8).numpy()


@functools.cache
def coverage(size: int, side: int) -> Tensor:
    """Return which share of each of `side` new pixels is covered by each of `size` old ones: [side, size]."""
    edge, step = torch.arange(side, dtype=torch.float64).unsqueeze(1) * (size / side), size / side
    pixel = torch.arange(size, dtype=torch.float64)
    overlap = torch.minimum(edge + step, pixel + 1) - torch.maximum(edge, pixel)
    return (overlap.clamp(min=0) / step).float()


class ObservationCodec:
    """A converter of an environment's observations: one array, or a mapping of arrays in order of name.

    frame_stack: frames in an image's channels, the oldest first; at the start of an episode its first frame fills the
    missing ones. image_size: side that images are resized to; None leaves them. Raises ValueError for sizes below 1,
    and for a frame stack without images; TypeError for mappings within mappings and for spaces that `ObservationEntry`
    cannot take.
    """

    def __init__(
        self, name: str, space: spaces.Space[Any], frame_stack: int = 1, image_size: int | None = None
    ) -> None:
        if frame_stack < 1:
            raise ValueError(f"env.frame_stack is {frame_stack}, expected at least 1.")
        if image_size is not None and image_size < 1:
            raise ValueError(
                f"env.image_size is {image_size}, expected at least 1, or null to leave images as they are."
            )
        self._name = name
        self._mapping = isinstance(space, spaces.Dict)
        self._frames: dict[str, deque[Array]] = {}
        if isinstance(space, spaces.Dict):
            given = {key: space.spaces[key] for key in sorted(space.spaces)}
            self._entries = {
                key: ObservationEntry(f"{name}: observation {key!r}", part, image_size) for key, part in given.items()
            }
            self.space: spaces.Space[Any] = spaces.Dict({k: entry.space for k, entry in self._entries.items()})
        else:
            self._entries = {"obs": ObservationEntry(f"{name}: the observation", space, image_size)}
            self.space = self._entries["obs"].space
        if frame_stack > 1:
            self._stack_images(frame_stack)

    def _stack_images(self, count: int) -> None:
        images = [key for key, entry in self._entries.items() if entry.space.dtype == np.uint8]
        if not images:
            raise ValueError(f"env.frame_stack is {count}, but {self._name} shows no images. Leave it at 1.")
        self._frames = {key: deque(maxlen=count) for key in images}
        for key in images:
            channels, height, width = self._entries[key].space.shape or ()
            stacked = spaces.Box(0, 255, (count * channels, height, width), np.uint8)
            if isinstance(self.space, spaces.Dict):
                self.space.spaces[key] = stacked
            else:
                self.space = stacked

    def __call__(self, obs: Any, first: bool = False) -> ObsArray:
        """Convert one observation; first: it starts an episode. Raises ValueError for other keys, shapes or values."""
        converted = self._convert(obs)
        if not self._frames:
            return converted
        parts = dict(converted) if isinstance(converted, Mapping) else {"obs": converted}
        for key, frames in self._frames.items():
            frames.extend([parts[key]] * (frames.maxlen or 1) if first else [parts[key]])
            parts[key] = np.concatenate(frames)
        return parts if self._mapping else parts["obs"]

    def _convert(self, obs: Any) -> ObsArray:
        if not self._mapping:
            return self._entries["obs"](obs)
        if not isinstance(obs, Mapping) or obs.keys() != self._entries.keys():
            found = sorted(obs) if isinstance(obs, Mapping) else type(obs).__name__
            raise ValueError(f"{self._name} gave an observation with {found}, expected {list(self._entries)}.")
        return {key: entry(obs[key]) for key, entry in self._entries.items()}


class ActionCodec:
    """A converter of actions: continuous ones are scaled from [-1, 1] to finite bounds, choices are one-hot parts.

    space: the agent's action space. size: A. classes: the number of choices of each part, () for continuous actions.
    Raises TypeError for other spaces.
    """

    def __init__(self, name: str, space: spaces.Space[Any]) -> None:
        self._name, self._native = name, space
        self.classes = action_classes(space)
        self.space: spaces.Space[Any]
        if isinstance(space, spaces.Box):
            self._low, self._high = (np.asarray(b, np.float64).reshape(-1) for b in (space.low, space.high))
            self.size = int(np.prod(space.shape))
            self.space = spaces.Box(-1.0, 1.0, (self.size,), np.float32)
        elif self.classes:
            self.size = sum(self.classes)
            single = isinstance(space, spaces.Discrete)
            self.space = spaces.Discrete(self.size) if single else spaces.MultiDiscrete(list(self.classes))
        else:
            raise TypeError(f"{name} has action space {space}, expected Box, Discrete, MultiDiscrete or MultiBinary.")

    def native(self, action: Array) -> Any:
        """Return the environment's own form of `action` [A]. Raises ValueError for another shape."""
        if action.shape != (self.size,):
            raise ValueError(f"{self._name}: an action is {action.shape}, expected ({self.size},).")
        space = self._native
        if isinstance(space, spaces.Box):
            action = np.clip(action.astype(np.float64), -1, 1)
            bounded = np.isfinite(self._low) & np.isfinite(self._high)
            low, high = np.where(bounded, self._low, -1), np.where(bounded, self._high, 1)
            return (low + (action + 1) / 2 * (high - low)).astype(space.dtype).reshape(space.shape)
        chosen = np.array([part.argmax() for part in np.split(action, np.cumsum(self.classes)[:-1])])
        if isinstance(space, spaces.Discrete):
            return int(chosen[0]) + int(space.start)
        if isinstance(space, spaces.MultiDiscrete):
            chosen = chosen + np.asarray(space.start).reshape(-1)
        return chosen.astype(space.dtype).reshape(space.shape)

    def rows(self, actions: Any) -> Array:
        """Return the environment's own actions [L, …] as an agent gives them, [L, A] float32: the inverse of `native`.

        Raises ValueError for another shape or an unknown choice. Numbers out of bounds are not clipped.
        """
        native, shape = np.asarray(actions), self._native.shape or ()
        if native.shape[1:] != shape:
            raise ValueError(f"{self._name}: actions are {native.shape}, expected L of shape {shape}.")
        flat = native.reshape(len(native), -1)
        if not self.classes:
            bounded = np.isfinite(self._low) & np.isfinite(self._high)
            low, high = np.where(bounded, self._low, -1), np.where(bounded, self._high, 1)
            width = np.where(high > low, high - low, 1)  # a number without a choice has no width
            return (2 * (flat - low) / width - 1).astype(np.float32)
        chosen = flat - np.asarray(getattr(self._native, "start", 0)).reshape(-1)
        if (chosen < 0).any() or (chosen >= self.classes).any():
            raise ValueError(f"{self._name}: actions run from {flat.min()} to {flat.max()}, expected {self._native}.")
        parts = [np.eye(n, dtype=np.float32)[chosen[:, part].astype(int)] for part, n in enumerate(self.classes)]
        return np.concatenate(parts, 1)


def action_classes(space: spaces.Space[Any]) -> tuple[int, ...]:
    """Return the number of choices of each one-hot part of an action, () for continuous actions."""
    if isinstance(space, spaces.Discrete):
        return (int(space.n),)
    if isinstance(space, spaces.MultiDiscrete):
        return tuple(int(n) for n in np.asarray(space.nvec).reshape(-1))
    if isinstance(space, spaces.MultiBinary):
        return (2,) * int(np.prod(space.shape))
    return ()


def _channels_last(first: int, middle: int, last: int) -> bool:
    """Return whether an image of that shape is [H, W, C]: a square tells, which many stacked frames would not."""
    if (first == middle) != (middle == last):
        return first == middle
    return last < first


def observation_columns(space: spaces.Space[Any]) -> dict[str, ColumnSpec]:
    """Return the replay columns of an `ObservationCodec`'s space: "obs", or "obs/<key>" for each entry of a mapping."""
    parts: Any = dict(space.spaces) if isinstance(space, spaces.Dict) else space
    return {name: ObservationEntry(name, part).column for name, part in split_obs(parts).items()}


def observation_shape(space: spaces.Space[Any]) -> ObsShape:
    """Return the shape of one observation of an `ObservationCodec`'s space, or a mapping of shapes."""
    shapes: ObsShape = join_obs({name: column.shape for name, column in observation_columns(space).items()})
    return shapes


def observation_classes(space: spaces.Space[Any]) -> dict[str, int]:
    """Return the class count, by key, of each observation whose entries are class indices."""
    parts = space.spaces if isinstance(space, spaces.Dict) else {"obs": space}
    counts = {key: ObservationEntry(key, part).classes for key, part in parts.items()}
    return {key: count for key, count in counts.items() if count}
