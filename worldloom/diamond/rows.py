"""Rows of replay as DIAMOND's parts read them: frames in [-1, 1], actions as class indices, borders of episodes.

Rows arrive: row t's action led to its frame. Frames and actions of another episode are grey, 0.0, and action 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from worldloom import functional as fn


def as_frames(obs: Tensor) -> Tensor:
    """Return images, uint8 or floats in [0, 1], as float32 frames in [-1, 1] of the same shape."""
    return fn.unit_pixels(obs).float() * 2 - 1


def as_images(frames: Tensor) -> Tensor:
    """Return frames in [-1, 1] as images in [0, 1]."""
    return (frames + 1) / 2


def as_context(frames: Tensor, actions: Tensor, episode: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Return frames and actions with grey and 0 in place of those of another episode than the present one.

    frames: [B, n, C, S, S]; actions: [B, n], the moves out of these frames, or [B, n - 1]; episode: [B, n], numbers
    that tell episodes apart; present: [B], the number of the present one.
    """
    same = episode == present.unsqueeze(1)
    return frames * same[:, :, None, None, None], actions * same[:, : actions.shape[1]]


@dataclass(frozen=True)
class Rows:
    """T rows of B windows, on the device of the model."""

    frames: Tensor  # [B, T, C, S, S] in [-1, 1]
    actions: Tensor  # [B, T] class indices, which led to these frames; 0 on is_first rows
    rewards: Tensor  # [B, T]
    terminated: Tensor  # [B, T] bool
    truncated: Tensor  # [B, T] bool
    is_first: Tensor  # [B, T] bool

    @property
    def episode(self) -> Tensor:
        """Numbers [B, T] that tell the episodes of a window apart."""
        return self.is_first.long().cumsum(1)

    @property
    def ended(self) -> Tensor:
        """Flags [B, T]: whether the episode ends here, truly or not."""
        return self.terminated | self.truncated


def stretch(last: Tensor, count: int) -> Tensor:
    """Return the `count` row numbers that end with last [B]: [B, count]."""
    return last.unsqueeze(1) + torch.arange(1 - count, 1, device=last.device)


def take(values: Tensor, rows: Tensor) -> Tensor:
    """Return the given rows [B, K] of values [B, T, ...]: [B, K, ...]."""
    return values[torch.arange(len(rows), device=rows.device).unsqueeze(1), rows]


def uniform_row(share: Tensor, low: int, high: int) -> Tensor:
    """Return row numbers [B] in low..high, uniform for shares [B] uniform in [0, 1)."""
    return low + (share * (high - low + 1)).long().clamp(max=high - low)


def draw_stretch(rows: Rows, share: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return frames [B, count, ...], actions and episode numbers [B, count] of `count` rows from anywhere."""
    last = uniform_row(share, count - 1, rows.frames.shape[1] - 1)
    found = stretch(last, count)
    return take(rows.frames, found), take(rows.actions, found), take(rows.episode, found)


def draw_start(rows: Rows, share: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `count` frames [B, n, ...] and the actions [B, n - 1] between them, from which imagination starts.

    The last of them is a uniform row from number n = count on, or the row before, if the episode ends on that one.
    """
    last = uniform_row(share, count, rows.frames.shape[1] - 1)
    last = last - take(rows.ended, last.unsqueeze(1))[:, 0].long()
    found = stretch(last, count)
    episode = take(rows.episode, found)
    return as_context(take(rows.frames, found), take(rows.actions, found[:, 1:]), episode, episode[:, -1])
