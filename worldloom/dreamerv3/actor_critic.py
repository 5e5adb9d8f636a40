"""DreamerV3's policies, return range, returns and policy loss, for learning in imagination and from replay.

Hafner et al. 2025, "Critic learning" and "Actor learning".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from worldloom import functional as fn
from worldloom.dreamerv3.config import DreamerV3Config
from worldloom.dreamerv3.layers import Linear, mlp

HALF_LOG_TAU = 0.9189385332046727  # ln(2 pi) / 2
POLICY_SCALE = 0.01  # scale of the initial output kernels


class ContinuousPolicy(nn.Module):
    """A normal with mean tanh(m) and std 0.1 + 0.9 sigmoid(s + 2); its samples are neither squashed nor clipped."""

    def __init__(self, inputs: int, units: int, layers: int, action_dim: int) -> None:
        super().__init__()
        self.mlp = mlp(inputs, units, layers)
        self.mean = Linear(units, action_dim, POLICY_SCALE)
        self.std = Linear(units, action_dim, POLICY_SCALE)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean in [-1, 1] and std in [0.1, 1], [..., A] each, for features [..., D + S K]."""
        x = self.mlp(features)
        return torch.tanh(self.mean(x).float()), 0.1 + 0.9 * torch.sigmoid(self.std(x).float() + 2.0)

    def sample(self, features: Tensor, noise: Tensor) -> Tensor:
        """Draw actions mean + std * noise, [..., A]; noise: [..., A] standard normal."""
        mean, std = self(features)
        return torch.addcmul(mean, std, noise)

    def log_prob_and_entropy(self, features: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return log probability of action [..., A] and entropy, in nats: [...] each, summed over action dimensions."""
        mean, std = self(features)
        log_std = std.log()
        log_prob = -0.5 * ((action - mean) / std).square() - log_std - HALF_LOG_TAU
        return log_prob.sum(-1), (0.5 + HALF_LOG_TAU + log_std).sum(-1)

    def draw_noise(self, shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Draw noise for `sample`: [*shape, A] standard normal."""
        return torch.randn(*shape, self.mean.out_features, generator=generator, device=device)


class DiscretePolicy(nn.Module):
    """Independent categoricals over one-hot parts of the action, each mixed with a share `unimix` of the uniform one.

    classes: the choices of each part; they sum to A.
    """

    def __init__(self, inputs: int, units: int, layers: int, classes: tuple[int, ...], unimix: float) -> None:
        super().__init__()
        self.mlp = mlp(inputs, units, layers)
        self.logits = Linear(units, sum(classes), POLICY_SCALE)
        self.classes, self.unimix = classes, unimix

    def forward(self, features: Tensor) -> list[Tensor]:
        """Return the log probabilities of each part, [..., classes], for features [..., D + S K]."""
        parts = self.logits(self.mlp(features)).split(self.classes, -1)
        return [fn.unimix_log_probs(logits, self.unimix) for logits in parts]

    def sample(self, features: Tensor, noise: Tensor) -> Tensor:
        """Draw one-hot actions [..., A]; noise: [..., A] standard exponential."""
        drawn = [
            fn.draw_one_hot(log_probs.exp(), part)
            for log_probs, part in zip(self(features), noise.split(self.classes, -1), strict=True)
        ]
        return torch.cat(drawn, -1)

    def log_prob_and_entropy(self, features: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return log probability of action [..., A] and entropy, in nats: [...] each, summed over the parts."""
        log_probs = torch.cat(self(features), -1)
        return (log_probs * action).sum(-1), -(log_probs.exp() * log_probs).sum(-1)

    def draw_noise(self, shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Draw noise for `sample`: [*shape, A] standard exponential."""
        return fn.exponential_noise((*shape, self.logits.out_features), generator, device)


class ReturnRange(nn.Module):
    """Running 5th and 95th percentiles of returns, which start at 0 and are not debiased.

    `scale` is S = max(1, high - low), by which advantages are divided (Hafner et al. 2025, "Actor learning").
    """

    low: Tensor
    high: Tensor

    def __init__(self, config: DreamerV3Config) -> None:
        super().__init__()
        self._config = config
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def after(self, returns: Tensor) -> tuple[Tensor, Tensor]:
        """Return both percentiles after these returns, low + rate (P5 - low) and likewise high; `move` stores them."""
        c = self._config
        low, high = fn.percentile_range(returns, c.return_low, c.return_high)
        return self.low.lerp(low, c.return_rate), self.high.lerp(high, c.return_rate)

    def move(self, low: Tensor, high: Tensor, made: Tensor) -> None:
        """Store new percentiles. made: bool scalar; where it is False the range stays."""
        self.low.copy_(torch.where(made, low, self.low))
        self.high.copy_(torch.where(made, high, self.high))

    @property
    def scale(self) -> Tensor:
        """S, a scalar."""
        return self.scale_of(self.low, self.high)

    @staticmethod
    def scale_of(low: Tensor, high: Tensor) -> Tensor:
        """Return S = max(1, high - low), a scalar."""
        return (high - low).clamp(min=1.0)


@dataclass(frozen=True)
class Imagined:
    """A batch of imagined rollouts from N starts, all detached. Index 0 is the start, H the last step."""

    features: Tensor  # [H + 1, N, F]
    actions: Tensor  # [H + 1, N, A], chosen at those features
    rewards: Tensor  # [H + 1, N], for arriving there
    continues: Tensor  # [H + 1, N], predicted, discount included
    values: Tensor  # [H + 1, N], of the online critic
    slow_values: Tensor  # [H + 1, N]

    def returns(self, lam: float) -> Tensor:
        """Return the lambda returns [H, N] (Hafner et al. 2025, "Critic learning"), from the reward r, the continue c
        and the value v of the next step: R[t] = r[t+1] + c[t+1] ((1 - lam) v[t+1] + lam R[t+1]), R[H] = v[H]."""
        return fn.lambda_return(self.rewards[1:], self.continues[1:], self.values[1:], lam)

    def weights(self) -> Tensor:
        """Return c[0] c[1] ... c[t], [H, N]: the discounted chance that the episode goes on after step t."""
        return self.continues[:-1].cumprod(0)


def policy_loss(log_prob: Tensor, entropy: Tensor, advantage: Tensor, weight: Tensor, entropy_scale: float) -> Tensor:
    """Return REINFORCE with an entropy bonus, a scalar (Hafner et al. 2025, "Actor learning").

    -mean(weight (log_prob sg(advantage) + entropy_scale entropy)), all [H, N]; advantage is (R - v) / S.
    """
    return -(weight * (log_prob * advantage.detach() + entropy_scale * entropy)).mean()


def replay_returns(
    rewards: Tensor, terminated: Tensor, last: Tensor, boot: Tensor, discount: float, lam: float
) -> Tensor:
    """Return the lambda returns [T - 1, B] of real rows [T, B], with imagined returns `boot` [T, B] as values.

    R[t] = rewards[t+1] + live ((1 - mix) boot[t+1] + mix R[t+1]), where live = discount (1 - terminated[t+1]) and
    mix = lam (1 - last[t+1]): the last row of an episode ends the trace, and nothing is earned after termination.
    """
    live = discount * (1 - terminated[1:])
    mix = lam * (1 - last[1:])
    return fn.lambda_return(rewards[1:], live, boot[1:], mix)
