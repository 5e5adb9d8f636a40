"""TD-MPC2's policy prior: a squashed normal for continuous actions, independent choices for one-hot ones.

Both have one interface: `policy.sample(z, noise, mask)` draws a sample, which has methods for its value and loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloom import functional as fn
from worldloom.nets import mlp

HALF_LOG_TAU = 0.9189385175704956  # log(2 pi) / 2, as the reference writes it

ValueOf = Callable[[Tensor], Tensor]  # values [...] of actions [..., A]


@dataclass(frozen=True)
class GaussianSample:
    """Actions drawn from a squashed normal: [..., A] each, but `log_prob` and `scaled_entropy` [...].

    A plan needs only the actions, so that the rest is computed when it is asked for.
    """

    action: Tensor
    mean: Tensor  # before squashing
    log_std: Tensor
    noise: Tensor
    mask: Tensor | None = None

    @property
    def mean_action(self) -> Tensor:
        return torch.tanh(self.mean)

    @property
    def log_prob(self) -> Tensor:
        """The log probability, [...]: g - sum ln(relu(1 - a^2) + 1e-6), with g the log density before squashing."""
        return self._densities()[1]

    @property
    def scaled_entropy(self) -> Tensor:
        """The bonus in the policy loss, [...]: -log_prob * A g / log_prob = -A g, the reference's, without a correction
        for tanh (its issue #76). A counts the dimensions that a task uses."""
        density, log_prob = self._densities()
        size = self.mean.shape[-1] if self.mask is None else self.mask.sum(-1)
        return -log_prob * (size * density / (log_prob + 1e-8))

    def _densities(self) -> tuple[Tensor, Tensor]:
        density = (-0.5 * self.noise.square() - self.log_std - HALF_LOG_TAU).sum(-1)
        return density, density - torch.log(F.relu(1 - self.action.square()) + 1e-6).sum(-1)

    def values(self, value: ValueOf) -> Tensor:
        """Return the values [...] of the drawn actions, for `expected` and `loss`."""
        return value(self.action)

    def expected(self, values: Tensor) -> Tensor:
        """Return an estimate of the policy's value, [...]: the value of the drawn action."""
        return values

    def loss(self, values: Tensor, scale: Tensor, entropy_coef: float) -> Tensor:
        """Return -(Q / S + entropy_coef * scaled_entropy), [...] (Hansen et al. 2024, eq. 4). scale: S."""
        return -(values / scale + entropy_coef * self.scaled_entropy)


@dataclass(frozen=True)
class CategoricalSample:
    """One-hot actions drawn part by part: [..., A] each, but `log_prob` and `entropy` [...]."""

    action: Tensor
    mean_action: Tensor  # the likeliest choice of each part
    log_probs: Tensor
    log_prob: Tensor
    entropy: Tensor  # exact, not that of the draw
    classes: tuple[int, ...]

    def values(self, value: ValueOf) -> Tensor:
        """Return the values [..., A], without gradient, of every choice of every part, with the other parts as drawn;
        for `expected` and `loss`."""
        with torch.no_grad():  # a decorated method of a dataclass cannot be compiled
            return value(alternatives(self.action, self.classes)).movedim(0, -1)

    def expected(self, values: Tensor) -> Tensor:
        """Return the policy's value, [...]: its expectation over the choices of each part, averaged over parts."""
        return (self.log_probs.exp() * values).sum(-1).detach() / len(self.classes)

    def loss(self, values: Tensor, scale: Tensor, entropy_coef: float) -> Tensor:
        """Return the cross-entropy [...] with the best policy under these values; see `boltzmann`."""
        target = boltzmann(values, scale * entropy_coef, self.classes)
        return -(target * self.log_probs).sum(-1)


Sample = GaussianSample | CategoricalSample


class GaussianPolicy(nn.Sequential):
    """a = tanh(mean + noise exp(log_std)), with log_std between two bounds (Hansen et al. 2024, section 3.1)."""

    classes: tuple[int, ...] = ()

    def __init__(self, sizes: Sequence[int], action_dim: int, log_std_bounds: tuple[float, float]) -> None:
        super().__init__(*mlp(sizes, 2 * action_dim))
        self.log_std_bounds = log_std_bounds

    def sample(self, z: Tensor, noise: Tensor, mask: Tensor | None = None) -> GaussianSample:
        """Draw actions at z [..., D + T]. noise: [..., A] standard normal; mask: [..., A], 1 where a task uses it."""
        mean, raw = self(z).chunk(2, -1)
        log_std = bounded(raw, *self.log_std_bounds)
        if mask is not None:
            mean, log_std, noise = mean * mask, log_std * mask, noise * mask
        return squashed_sample(mean, log_std, noise, mask)


class CategoricalPolicy(nn.Sequential):
    """Independent choices, one for each part of a one-hot action (an extension of ours)."""

    def __init__(self, sizes: Sequence[int], classes: Sequence[int]) -> None:
        super().__init__(*mlp(sizes, sum(classes)))
        self.classes = tuple(classes)

    def sample(self, z: Tensor, noise: Tensor, mask: Tensor | None = None) -> CategoricalSample:  # noqa: ARG002
        """Draw actions at z [..., D]. noise: [..., A] standard normal; no mask is read, since there are no tasks."""
        return categorical_sample(self(z), noise, self.classes)


def bounded(raw: Tensor, low: float, high: float) -> Tensor:
    """Return low + (high - low) (tanh(raw) + 1) / 2, elementwise: [...] to [...]."""
    return low + 0.5 * (high - low) * (torch.tanh(raw) + 1)


def squashed_sample(mean: Tensor, log_std: Tensor, noise: Tensor, mask: Tensor | None = None) -> GaussianSample:
    """Draw a = tanh(mean + noise exp(log_std)); all [..., A]. mask: 1 in the dimensions that a task uses."""
    return GaussianSample(torch.tanh(mean + noise * log_std.exp()), mean, log_std, noise, mask)


def categorical_sample(logits: Tensor, noise: Tensor, classes: Sequence[int]) -> CategoricalSample:
    """Draw one choice for each part of `classes`; logits and noise (standard normal): [..., A]."""
    log_probs = torch.cat([F.log_softmax(part, -1) for part in logits.split(tuple(classes), -1)], -1)
    probs, drawn = log_probs.exp(), choose(log_probs, noise, classes)
    entropy = -(probs * log_probs).sum(-1)
    likeliest = likeliest_choice(log_probs, classes).to(logits.dtype)
    return CategoricalSample(drawn, likeliest, log_probs, (drawn * log_probs).sum(-1), entropy, tuple(classes))


def choose(log_probs: Tensor, noise: Tensor, classes: Sequence[int]) -> Tensor:
    """Draw one-hot choices [..., A], part by part; noise: [..., A] standard normal, turned into Gumbel by quantiles."""
    uniform = torch.special.ndtr(noise).clamp(1e-7, 1 - 1e-7)
    return likeliest_choice(log_probs - torch.log(-torch.log(uniform)), classes).to(noise.dtype)


def likeliest_choice(scores: Tensor, classes: Sequence[int]) -> Tensor:
    """Return the largest of the scores [..., A] in each part, as one-hot bools [..., A]."""
    parts = [fn.one_hot(part.argmax(-1), part.shape[-1]) for part in scores.split(tuple(classes), -1)]
    return torch.cat(parts, -1)


def alternatives(action: Tensor, classes: Sequence[int]) -> Tensor:
    """Return [A, ..., A]: for every choice of every part of one-hot actions [..., A], the action with that choice."""
    made, begin = [], 0
    for count in classes:
        for choice in torch.eye(count, device=action.device, dtype=action.dtype):
            before, part, after = action.split([begin, count, action.shape[-1] - begin - count], -1)
            made.append(torch.cat([before, choice.expand_as(part), after], -1))
        begin += count
    return torch.stack(made)


def boltzmann(values: Tensor, temperature: Tensor, classes: Sequence[int]) -> Tensor:
    """Return softmax(values / temperature) over each part: probabilities [..., A] of values [..., A].

    Of all categorical policies these maximise expected value plus temperature times entropy. Cross-entropy with them
    also moves a policy that is certain and wrong, where the gradient of its own expected value is zero.
    """
    parts = (values / temperature).split(tuple(classes), -1)
    return torch.cat([part.softmax(-1) for part in parts], -1)
