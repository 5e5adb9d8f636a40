"""STORM's behaviour, which learns from imagined steps: policy, critic, slow critic and the range of returns.

Zhang et al. 2023, "Agent learning".
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from worldloom import functional as fn
from worldloom.actor_critic import ChoicePolicy, NormalPolicy, RunningRange, policy_loss
from worldloom.nets import relu_head, relu_mlp
from worldloom.storm.config import STORMConfig


class Behaviour(nn.Module):
    """Policy, critic, slow critic and the return range, on features [z, h], [..., S K + D].

    action_classes: the choices of each one-hot part of an action; () for continuous actions (an extension of ours).
    """

    def __init__(self, config: STORMConfig, action_dim: int, action_classes: tuple[int, ...]) -> None:
        super().__init__()
        c, features = config, config.stoch * config.classes + config.hidden
        trunk = relu_mlp(features, c.units, c.agent_layers)
        self.policy: ChoicePolicy | NormalPolicy
        if action_classes:
            self.policy = ChoicePolicy(trunk, nn.Linear(c.units, action_dim), action_classes, unimix=0.0)
        else:
            self.policy = NormalPolicy(trunk, nn.Linear(c.units, action_dim), nn.Linear(c.units, action_dim))
        self.value = relu_head(features, c.units, c.agent_layers, c.bins)
        self.slow_value = copy.deepcopy(self.value).requires_grad_(False)
        self.range = RunningRange(c.return_rate, partial(percentiles, low=c.return_low, high=c.return_high))


def percentiles(returns: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return two quantiles of all n returns, scalars: the int(q n)-th smallest, without interpolation."""
    ordered = returns.detach().flatten().sort().values
    lowest, highest = (max(int(q * len(ordered)), 1) - 1 for q in (low, high))
    return ordered[lowest], ordered[highest]


@dataclass(frozen=True)
class Imagined:
    """A batch of imagined rollouts of H steps from N starts, all detached. Index 0 is the start."""

    features: Tensor  # [H + 1, N, S K + D]
    actions: Tensor  # [H, N, A], chosen at those features
    rewards: Tensor  # [H, N], for the move out of each step
    continues: Tensor  # [H, N], discount times 1 - termination, which is 0 or 1
    values: Tensor  # [H + 1, N], of the online critic
    slow_values: Tensor  # [H + 1, N]


def lambda_returns(rewards: Tensor, continues: Tensor, values: Tensor, lam: float, published: bool) -> Tensor:
    """Return the lambda returns [H, N] of rewards r and continues c [H, N] and values v [H + 1, N].

    R[t] = r[t] + c[t] ((1 - lam) v[t + 1] + lam R[t + 1]), with R[H] = v[H]. published: the authors' code has v[t] in
    place of v[t + 1]; the term that this adds goes into the reward.
    """
    if published:
        rewards = rewards + continues * (1 - lam) * (values[:-1] - values[1:])
    return fn.lambda_return(rewards, continues, values[1:], lam)


def agent_losses(
    behaviour: Behaviour,
    imagined: Imagined,
    returns: tuple[Tensor, Tensor],
    scale: Tensor,
    bins: Tensor,
    entropy_scale: float,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return policy and value loss, and scalars to log.

    returns: [H, N] each, from the critic's values, and from the slow critic's, which regularise the critic. Steps after
    a predicted end weigh as much as others. scale: S, which divides advantages.
    """
    features, (own, slow) = imagined.features[:-1], returns
    log_prob, entropy = behaviour.policy.log_prob_and_entropy(features, imagined.actions)
    advantage = (own - imagined.values[:-1]) / scale
    logits = behaviour.value(features).float()
    targets = sum(fn.two_hot(fn.symlog(target), bins) for target in (own, slow))
    losses = {
        "policy_loss": policy_loss(log_prob, entropy, advantage, 1.0, entropy_scale),
        "value_loss": fn.soft_cross_entropy(logits, torch.as_tensor(targets)).mean(),
    }
    logged = {
        "policy_entropy": entropy.mean(),
        "advantage_magnitude": advantage.abs().mean(),
        "return": own.mean(),
        "return_range": scale,
        "imagined_reward": imagined.rewards.mean(),
        "imagined_continue": imagined.continues.mean(),
        "value": imagined.values.mean(),
    }
    return losses, logged
