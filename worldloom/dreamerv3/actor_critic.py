"""DreamerV3's policies, return range and returns, for learning in imagination and from replay.

Hafner et al. 2025, "Critic learning" and "Actor learning".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from worldloom import functional as fn
from worldloom.actor_critic import ChoicePolicy, NormalPolicy, RunningRange
from worldloom.dreamerv3.config import DreamerV3Config
from worldloom.dreamerv3.layers import Linear, mlp

POLICY_SCALE = 0.01  # scale of the initial output kernels


class ContinuousPolicy(NormalPolicy):
    """A normal policy on features [..., D + S K], from an MLP of `layers` layers of `units`."""

    def __init__(self, inputs: int, units: int, layers: int, action_dim: int) -> None:
        trunk, mean = mlp(inputs, units, layers), Linear(units, action_dim, POLICY_SCALE)
        super().__init__(trunk, mean, Linear(units, action_dim, POLICY_SCALE))


class DiscretePolicy(ChoicePolicy):
    """A policy of choices on features [..., D + S K], from an MLP of `layers` layers of `units`.

    classes: the choices of each part of the action; unimix: share of the uniform distribution.
    """

    def __init__(self, inputs: int, units: int, layers: int, classes: tuple[int, ...], unimix: float) -> None:
        trunk = mlp(inputs, units, layers)
        super().__init__(trunk, Linear(units, sum(classes), POLICY_SCALE), classes, unimix)


class ReturnRange(RunningRange):
    """The running range of returns, with the rate and quantiles of the config."""

    def __init__(self, config: DreamerV3Config) -> None:
        percentiles = partial(fn.percentile_range, low=config.return_low, high=config.return_high)
        super().__init__(config.return_rate, percentiles)


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
