"""Policies, the range of returns and the policy loss of agents that learn in imagination.

Hafner et al. 2025, "Critic learning" and "Actor learning"; STORM (Zhang et al. 2023) takes them over.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from worldloom import functional as fn

HALF_LOG_TAU = 0.9189385332046727  # ln(2 pi) / 2


class NormalPolicy(nn.Module):
    """A normal with mean tanh(m) and std 0.1 + 0.9 sigmoid(s + 2); its samples are neither squashed nor clipped.

    mlp: a network from features to [..., units]; mean, std: linear layers from there to m and s, [..., A] each.
    """

    noise = "normal_action"  # what a program calls it

    def __init__(self, mlp: nn.Module, mean: nn.Linear, std: nn.Linear) -> None:
        super().__init__()
        self.mlp, self.mean, self.std = mlp, mean, std

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean in [-1, 1] and std in [0.1, 1], [..., A] each, for features [..., F]."""
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

    def mode_noise(self, shape: tuple[int, ...]) -> Tensor:
        """Return the noise [*shape, A] with which `sample` gives the mean."""
        return torch.zeros(*shape, self.mean.out_features)


class ChoicePolicy(nn.Module):
    """Independent categoricals over one-hot parts of the action, each mixed with a share `unimix` of the uniform one.

    mlp: a network from features to [..., units]; logits: a linear layer from there to [..., A]. classes: the choices of
    each part; they sum to A.
    """

    noise = "exponential_action"  # what a program calls it

    def __init__(self, mlp: nn.Module, logits: nn.Linear, classes: tuple[int, ...], unimix: float) -> None:
        super().__init__()
        self.mlp, self.logits, self.classes, self.unimix = mlp, logits, classes, unimix

    def forward(self, features: Tensor) -> list[Tensor]:
        """Return the log probabilities of each part, [..., classes], for features [..., F]."""
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

    def mode_noise(self, shape: tuple[int, ...]) -> Tensor:
        """Return the noise [*shape, A] with which `sample` gives the likeliest choices."""
        return torch.ones(*shape, self.logits.out_features)


class RunningRange(nn.Module):
    """Running low and high percentiles of returns, which start at 0 and are not debiased.

    `scale` is S = max(1, high - low), by which advantages are divided (Hafner et al. 2025, "Actor learning"). rate:
    share of the way that they move in an update. percentiles: a function of returns [...] to both, scalars.
    """

    low: Tensor
    high: Tensor

    def __init__(self, rate: float, percentiles: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._rate, self._percentiles = rate, percentiles
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def after(self, returns: Tensor) -> tuple[Tensor, Tensor]:
        """Return both after these returns, low + rate (percentile - low) and likewise high; `move` stores them."""
        low, high = self._percentiles(returns)
        return self.low.lerp(low, self._rate), self.high.lerp(high, self._rate)

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


def policy_loss(
    log_prob: Tensor, entropy: Tensor, advantage: Tensor, weight: Tensor | float, entropy_scale: float
) -> Tensor:
    """Return REINFORCE with an entropy bonus, a scalar (Hafner et al. 2025, "Actor learning").

    -mean(weight (log_prob sg(advantage) + entropy_scale entropy)), all [H, N]; advantage is (R - v) / S.
    """
    return -(weight * (log_prob * advantage.detach() + entropy_scale * entropy)).mean()
