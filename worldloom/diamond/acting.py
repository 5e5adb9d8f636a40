"""One step of acting with DIAMOND, whose policy sees frames alone."""

from __future__ import annotations

import copy

import torch
from torch import nn

from worldloom import functional as fn
from worldloom.capture import Tensors
from worldloom.diamond.actor_critic import ActorCritic
from worldloom.diamond.rows import as_frames


class ActStep(nn.Module):
    """The step, of a copy of the policy; see `act_step`. epsilon: the chance of a uniform action."""

    def __init__(self, policy: ActorCritic, epsilon: float) -> None:
        super().__init__()
        self.policy, self.epsilon = copy.deepcopy(policy).cpu(), epsilon
        self.policy.__dict__.pop("encode", None)  # a compiled form, which belongs to the original

    def forward(self, given: Tensors) -> Tensors:
        return act_step(self.policy, given, self.epsilon)


def act_step(policy: ActorCritic, given: Tensors, epsilon: float) -> Tensors:
    """Return the LSTM's state after these frames, `hidden` and `cell`, and the drawn `action` [E, A].

    given: frames as `obs/obs` [E, C, S, S], `is_first` [E], the state before, `exponential_action` [E, A] of that
    standard distribution, and `uniform_explore` [E, 1]: where it is below epsilon, the action is a uniform one.
    """
    kept = (~given["is_first"]).float().unsqueeze(1)
    before = (given["hidden"] * kept, given["cell"] * kept)
    hidden, cell = policy.lstm(policy.encode(as_frames(given["obs/obs"])), before)
    probs = policy.log_probs(hidden).exp()
    probs = torch.where(given["uniform_explore"] < epsilon, 1 / probs.shape[1], probs)
    return {"hidden": hidden, "cell": cell, "action": fn.draw_one_hot(probs, given["exponential_action"])}
