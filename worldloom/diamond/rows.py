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
    return fn.unit_pixels(obs) * 2 - 1


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

    def draw_stretch(self, share: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return frames [B, count, ...], actions and episode numbers [B, count] of rows from anywhere; share: [B]
        uniform in [0, 1)."""
        return self._leading_to(self._uniform_row(share, count - 1), count)

    def draw_start(self, share: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return `count` frames [B, n, ...] and the actions [B, n - 1] between them, from which imagination starts.

        The last of them is a uniform row from number n = count on, or the row before if the episode ends on that one,
        truly or not; an episode has two rows at least. share: [B] uniform in [0, 1).
        """
        last = self._uniform_row(share, count)
        last = last - leading_to(last, self.terminated | self.truncated, 1)[:, 0].long()
        frames, actions, episode = self._leading_to(last, count)
        return as_context(frames, actions[:, 1:], episode, episode[:, -1])

    def _leading_to(self, last: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        frames, actions, episode = (leading_to(last, x, count) for x in (self.frames, self.actions, self.episode))
        return frames, actions, episode

    def _uniform_row(self, share: Tensor, low: int) -> Tensor:
        """Return row numbers [B], uniform from `low` to the last row."""
        count = self.frames.shape[1] - low
        return low + (share * count).long().clamp(max=count - 1)


def leading_to(last: Tensor, values: Tensor, count: int) -> Tensor:
    """Return the `count` rows of values [B, T, ...] that end with row number last [B]: [B, count, ...]."""
    rows = last.unsqueeze(1) + torch.arange(1 - count, 1, device=last.device)
    return values[torch.arange(len(rows), device=rows.device).unsqueeze(1), rows]
