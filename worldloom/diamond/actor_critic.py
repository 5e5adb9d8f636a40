"""Policy and critic, which see frames alone, and their losses on imagined steps (Alonso et al. 2024, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from worldloom import functional as fn
from worldloom.capture import Tensors
from worldloom.diamond.config import DiamondConfig
from worldloom.diamond.layers import LSTMCell, SmallResBlock, conv3
from worldloom.diamond.reward_end import Memory
from worldloom.gang import ALONE, Gang


class ActorCritic(nn.Module):
    """An encoder of frames, an LSTM, and a linear policy and critic on its hidden state, both of which start at 0.

    shape: of a frame, (C, S, S); actions: A, the number of choices. A fresh policy is exactly uniform.
    """

    def __init__(self, shape: tuple[int, ...], actions: int, config: DiamondConfig) -> None:
        super().__init__()
        levels, first = config.policy_levels, config.policy_channels
        widths = [first if 2 * level < levels else 2 * first for level in range(levels)]
        layers: list[nn.Module] = [conv3(shape[0], first)]
        for inputs, outputs in zip([first, *widths], widths, strict=False):
            layers += [SmallResBlock(inputs, outputs), nn.MaxPool2d(2)]
        self.encoder = nn.Sequential(*layers)
        side = shape[1] // 2**levels
        self.lstm = LSTMCell(widths[-1] * side**2, config.policy_lstm)
        self.critic, self.actor = nn.Linear(config.policy_lstm, 1), nn.Linear(config.policy_lstm, actions)
        for parameter in [*self.critic.parameters(), *self.actor.parameters()]:
            nn.init.zeros_(parameter)

    def encode(self, frames: Tensor) -> Tensor:
        """Return what the LSTM reads of frames [R, C, S, S]: [R, features]."""
        return cast(Tensor, self.encoder(frames).flatten(1))

    def unroll(self, frames: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Return hidden states [T, B, D] after each of frames [T, B, C, S, S], and the last state of the LSTM."""
        seen, hidden = self.encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]), []
        for features in seen.unbind():
            memory = self.lstm(features, memory)
            hidden.append(memory[0])
        return torch.stack(hidden), memory

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Return log probabilities of the actions, [..., A], in float32, for hidden states [..., D]."""
        return cast(Tensor, self.actor(hidden)).float().log_softmax(-1)

    def value(self, hidden: Tensor) -> Tensor:
        """Return values [...], in float32, for hidden states [..., D]."""
        return cast(Tensor, self.critic(hidden)).float().squeeze(-1)


@dataclass(frozen=True)
class Imagined:
    """B imagined rollouts of H steps, detached and time-first. A lane that ended goes on, and counts no more."""

    memory: Memory  # of the policy's LSTM before the first frame, [B, D] each
    frames: Tensor  # [H + 1, B, C, S, S], the start included
    actions: Tensor  # [H, B, A] one-hot, chosen at those frames
    rewards: Tensor  # [H, B], signs of the rewards of these moves
    ends: Tensor  # [H, B], 1 where the move ended the episode, else 0

    def weights(self, gang: Gang = ALONE) -> Tensor:
        """Return 1 [H, B] for steps that a lane takes before or when it ends, 0 for later ones, over their number, or
        its mean over all learners of a gang."""
        goes_on = 1 - self.ends
        alive = torch.cat([torch.ones_like(goes_on[:1]), goes_on[:-1].cumprod(0)])
        return alive / gang.average(alive.sum())

    def returns(self, next_values: Tensor, gamma: float, lam: float) -> Tensor:
        """Return the lambda returns [H, B], from the values [H, B] of the frames that the moves led to:
        R[t] = r[t] + gamma (1 - end[t]) ((1 - lam) V[t+1] + lam R[t+1]), R[H] = V[H]."""
        return fn.lambda_return(self.rewards, gamma * (1 - self.ends), next_values, lam)


def behaviour_losses(
    model: ActorCritic, imagined: Imagined, config: DiamondConfig, gang: Gang = ALONE
) -> tuple[Tensors, Tensors]:
    """Return the losses of policy and critic, and scalars to log (Alonso et al. 2024, section 3.3).

    With weights w that sum to 1: policy_loss = sum w (-log pi(a) sg(R - V) - entropy_scale H(pi)), value_loss = sum w
    (V - sg(R))^2. Gradients flow through the LSTM and the encoder over all H steps.
    """
    hidden, _ = model.unroll(imagined.frames, imagined.memory)
    values, log_probs, weight = model.value(hidden), model.log_probs(hidden[:-1]), imagined.weights(gang)
    returns = imagined.returns(values[1:].detach(), config.gamma, config.lam)
    advantage = (returns - values[:-1]).detach()
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    score = (log_probs * imagined.actions).sum(-1) * advantage + config.entropy_scale * entropy
    errors = (values[:-1] - returns).square()
    losses = {"policy_loss": -(weight * score).sum(), "value_loss": (weight * errors).sum()}
    logged = {
        "policy_entropy": (weight * entropy).sum(),
        "advantage_magnitude": (weight * advantage.abs()).sum(),
        "return": (weight * returns).sum(),
        "value": (weight * values[:-1]).sum(),
        "imagined_reward": (weight * imagined.rewards).sum(),
        "imagined_ends": imagined.ends.amax(0).mean(),
    }
    return losses, logged
