"""The parts of DreamerV3 that learn from imagined steps: policy, critic, slow critic and the range of returns."""

from __future__ import annotations

import copy

from torch import nn

from worldloom.dreamerv3.actor_critic import ContinuousPolicy, DiscretePolicy, ReturnRange
from worldloom.dreamerv3.world_model import DreamerV3WorldModel, Head


class Behaviour(nn.Module):
    """Policy, critic, slow critic and the return range.

    action_classes: the choices of each one-hot part of an action; () for continuous actions.
    """

    def __init__(self, model: DreamerV3WorldModel, action_classes: tuple[int, ...]) -> None:
        super().__init__()
        c = model.config
        features = c.deter + c.stoch * c.classes
        self.policy: ContinuousPolicy | DiscretePolicy
        if action_classes:
            self.policy = DiscretePolicy(features, c.units, c.policy_layers, action_classes, c.policy_unimix)
        else:
            self.policy = ContinuousPolicy(features, c.units, c.policy_layers, model.action_dim)
        self.value = Head(features, c.units, c.value_layers, c.bins, 0.0)
        self.slow_value = copy.deepcopy(self.value).requires_grad_(False)
        self.range = ReturnRange(c)
