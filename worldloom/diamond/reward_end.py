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

REWARDS = 3  # classes of reward: -1, 0 and 1
Memory = tuple[Tensor, Tensor]  # hidden and cell state of an LSTM, [B, D] each


@dataclass(frozen=True)
class Outcome:
    """The logits of a move's outcome."""

    reward: Tensor  # [..., 3], of the signs -1, 0 and 1
    end: Tensor  # [..., 2]: goes on, ends

    def expected_reward(self) -> Tensor:
        """Return p(1) - p(-1), [...]: rewards are known by their signs alone."""
        chances = self.reward.softmax(-1)
        return chances[..., 2] - chances[..., 0]

    def continues(self) -> Tensor:
        """Return the chance [...] that the episode goes on."""
        return self.end.softmax(-1)[..., 0]

    def draw(self, reward_noise: Tensor, end_noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draw signs of rewards and ends, 0 or 1: [...] each. Noise: [..., 3] and [..., 2] standard exponential."""
        sign = fn.draw_one_hot(self.reward.softmax(-1), reward_noise)
        return sign[..., 2] - sign[..., 0], fn.draw_one_hot(self.end.softmax(-1), end_noise)[..., 1]

    def losses(self, rewards: Tensor, ends: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropies of the reward's sign and of the end, scalars: means over the moves that are real.

        rewards, ends, real: [...] each; 0 if no move is real.
        """
        weight = real.float() / real.sum().clamp(min=1)
        signs = fn.one_hot(rewards.sign().long() + 1, REWARDS).float()
        choices = fn.one_hot(ends.long(), 2).float()
        reward_loss = (weight * fn.soft_cross_entropy(self.reward, signs)).sum()
        return reward_loss, (weight * fn.soft_cross_entropy(self.end, choices)).sum()


class RewardEnd(nn.Module):
    """The encoder, the LSTM and the head. shape: of a frame, (C, S, S); actions: the number of choices."""

    def __init__(self, shape: tuple[int, ...], actions: int, config: DiamondConfig) -> None:
        super().__init__()
        c = config
        self.act_emb = nn.Embedding(actions, c.reward_cond)
        self.conv_in = conv3(2 * shape[0], c.reward_channels)
        self.levels, width = self.make_levels(c), c.reward_channels
        self.last = ResBlocks([(width, width)] * 2, c.reward_cond, attention=True)
        side = shape[1] // 2 ** (c.reward_levels - 1)
        self.lstm = LSTMCell(width * side**2, c.reward_lstm)
        units = c.reward_lstm
        self.head = nn.Sequential(nn.Linear(units, units), nn.SiLU(), nn.Linear(units, REWARDS + 2, bias=False))

    @staticmethod
    def make_levels(config: DiamondConfig) -> Halving:
        levels = config.reward_levels
        return Halving([config.reward_channels] * levels, [config.reward_depth] * levels, config.reward_cond)

    def initial(self, batch: int) -> Memory:
        """Return the LSTM's state before any move, zeros [B, D] twice."""
        zeros = torch.zeros(batch, self.lstm.hidden_size, device=self.lstm.weight_hh.device)
        return zeros, zeros

    def features(self, before: Tensor, actions: Tensor, after: Tensor) -> Tensor:
        """Return features [R, C, h, w] of R moves from frame `before` to frame `after`, [R, C, S, S] each."""
        cond = self.act_emb(actions)
        kept = self.levels(self.conv_in(torch.cat([before, after], 1)), cond)
        return cast(Tensor, self.last(kept[-1][-1], cond)[-1])

    def outcome(self, hidden: Tensor) -> Outcome:
        """Return the outcome of the move that led to these hidden states [..., D], in float32."""
        return Outcome(*self.head(hidden).float().split((REWARDS, 2), -1))

    def step(self, before: Tensor, actions: Tensor, after: Tensor, memory: Memory) -> Memory:
        """Return the LSTM's state after a move; frames [B, C, S, S], actions [B] class indices."""
        return cast(Memory, self.lstm(self.features(before, actions, after).flatten(1), memory))

    def burn_in(self, frames: Tensor, actions: Tensor) -> Memory:
        """Return the LSTM's state after the moves between frames [B, n, C, S, S] by actions [B, n - 1]."""
        moves = frames.shape[1] - 1
        seen = self.features(frames[:, :-1].flatten(0, 1), actions.flatten(), frames[:, 1:].flatten(0, 1))
        memory = self.initial(len(frames))
        for features in seen.flatten(1).unflatten(0, (-1, moves)).unbind(1):
            memory = self.lstm(features, memory)
        return memory

    def hidden(self, frames: Tensor, actions: Tensor, is_first: Tensor) -> Tensor:
        """Return the LSTM's hidden states [B, T - 1, D] after the moves between T rows.

        frames: [B, T, C, S, S]; actions, is_first: [B, T]. A move into an is_first row starts from zeros, from a grey
        frame, 0.0, with action 0.
        """
        kept = (~is_first[:, 1:]).float()
        before = frames[:, :-1] * kept[:, :, None, None, None]
        moves = actions[:, 1:] * ~is_first[:, 1:]
        seen = self.features(before.flatten(0, 1), moves.flatten(), frames[:, 1:].flatten(0, 1))
        memory, hidden = self.initial(len(frames)), []
        for features, keep in zip(seen.flatten(1).unflatten(0, kept.shape).unbind(1), kept.unbind(1), strict=True):
            memory = self.lstm(features, (memory[0] * keep[:, None], memory[1] * keep[:, None]))
            hidden.append(memory[0])
        return torch.stack(hidden, 1)

    def losses(
        self, frames: Tensor, actions: Tensor, rewards: Tensor, ends: Tensor, is_first: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of reward and end over the moves between T rows, scalars; there is none into an is_first
        row. frames: [B, T, C, S, S], all others [B, T]."""
        outcome = self.outcome(self.hidden(frames, actions, is_first))
        return outcome.losses(rewards[:, 1:], ends[:, 1:], ~is_first[:, 1:])
