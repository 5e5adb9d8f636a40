"""The model of rewards and ends: what the sign of a move's reward is, and whether it ends the episode.

Alonso et al. 2024, section 3.2: a convolutional encoder of two frames, conditioned on the action, and an LSTM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from worldloom import functional as fn
from worldloom.diamond.config import DiamondConfig
from worldloom.diamond.layers import Halving, LSTMCell, ResBlocks, conv3
from worldloom.gang import ALONE, Gang

REWARDS, ENDS = 3, 2  # classes: a reward's sign -1, 0 or 1; the episode goes on or ends
Memory = tuple[Tensor, Tensor]  # hidden and cell state of an LSTM, [B, D] each


@dataclass(frozen=True)
class Outcome:
    """The logits of a move's outcome."""

    reward: Tensor  # [..., 3], of the signs -1, 0 and 1
    end: Tensor  # [..., 2]: goes on, ends

    def expected(self) -> tuple[Tensor, Tensor]:
        """Return p(1) - p(-1), since rewards are known by their signs alone, and the chance to go on: [...] each."""
        reward, end = self.reward.softmax(-1), self.end.softmax(-1)
        return reward[..., 2] - reward[..., 0], end[..., 0]

    def draw(self, reward_noise: Tensor, end_noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draw signs of rewards and ends, 0 or 1: [...] each. Noise: [..., 3] and [..., 2] standard exponential."""
        sign = fn.draw_one_hot(self.reward.softmax(-1), reward_noise)
        return sign[..., 2] - sign[..., 0], fn.draw_one_hot(self.end.softmax(-1), end_noise)[..., 1]

    def losses(self, rewards: Tensor, ends: Tensor, real: Tensor, gang: Gang = ALONE) -> tuple[Tensor, Tensor]:
        """Return the cross-entropies of the reward's sign and of the end, scalars: means over the moves that are real,
        0 if none is. rewards, ends, real: [...] each; gang: of learners that share a batch, whose losses then have the
        mean over all real moves as their own mean."""
        weight = real.float() / gang.average(real.sum().float()).clamp(min=1 / gang.size)
        signs, choices = fn.one_hot(rewards.sign().long() + 1, REWARDS), fn.one_hot(ends.long(), ENDS)
        reward_loss = (weight * fn.soft_cross_entropy(self.reward, signs.float())).sum()
        return reward_loss, (weight * fn.soft_cross_entropy(self.end, choices.float())).sum()


class RewardEnd(nn.Module):
    """The encoder, the LSTM and the head. shape: of a frame, (C, S, S); actions: the number of choices."""

    def __init__(self, shape: tuple[int, ...], actions: int, config: DiamondConfig) -> None:
        super().__init__()
        width, levels, units = config.reward_channels, config.reward_levels, config.reward_lstm
        self.act_emb = nn.Embedding(actions, config.reward_cond)
        self.conv_in = conv3(2 * shape[0], width)
        self.levels = Halving([(width, config.reward_depth, False)] * levels, config.reward_cond)
        self.last = ResBlocks([(width, width)] * 2, config.reward_cond, attention=True)
        self.lstm = LSTMCell(width * (shape[1] // 2 ** (levels - 1)) ** 2, units)
        self.head = nn.Sequential(nn.Linear(units, units), nn.SiLU(), nn.Linear(units, REWARDS + ENDS, bias=False))

    def features(self, before: Tensor, actions: Tensor, after: Tensor) -> Tensor:
        """Return features [R, C, h, w] of R moves from frame `before` to frame `after`, [R, C, S, S] each."""
        cond = self.act_emb(actions)
        kept = self.levels(self.conv_in(torch.cat([before, after], 1)), cond)
        return cast(Tensor, self.last(kept[-1][-1], cond)[-1])

    def unroll(self, frames: Tensor, actions: Tensor, is_first: Tensor | None = None) -> tuple[Tensor, Memory]:
        """Return the LSTM's hidden states [B, T, D] after T moves between frames, from zeros, and its last state.

        frames: [B, T + 1, C, S, S]; actions: [B, T]; is_first: [B, T], whether a move goes into a new episode. Such a
        move starts from zeros, from a grey frame, 0.0, with action 0.
        """
        kept = torch.ones(actions.shape, device=frames.device) if is_first is None else (~is_first).float()
        before = frames[:, :-1] * kept[:, :, None, None, None]
        seen = self.features(before.flatten(0, 1), (actions * kept.long()).flatten(), frames[:, 1:].flatten(0, 1))
        memory, hidden = self.lstm.initial(len(frames)), []
        for features, keep in zip(seen.flatten(1).unflatten(0, kept.shape).unbind(1), kept.unbind(1), strict=True):
            memory = self.lstm(features, (memory[0] * keep[:, None], memory[1] * keep[:, None]))
            hidden.append(memory[0])
        return torch.stack(hidden, 1), memory

    def outcome(self, hidden: Tensor) -> Outcome:
        """Return the outcome of the move that led to these hidden states [..., D], in float32."""
        return Outcome(*self.head(hidden).float().split((REWARDS, ENDS), -1))
