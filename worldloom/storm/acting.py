"""One step of acting with STORM: see an observation, remember a token, choose an action."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from worldloom.actor_critic import ChoicePolicy, NormalPolicy
from worldloom.capture import Tensors
from worldloom.observations import as_mapping
from worldloom.program import without
from worldloom.storm.networks import STORMNetworks


class ActStep(nn.Module):
    """The step, of copies of the parts that acting needs; see `act_step`."""

    def __init__(self, model: STORMNetworks, policy: ChoicePolicy | NormalPolicy) -> None:
        super().__init__()
        self.model, self.policy = without(model, "decoder", "reward", "termination"), copy.deepcopy(policy).cpu()

    def forward(self, given: Tensors) -> Tensors:
        return act_step(self.model, self.policy, given)


def act_step(model: STORMNetworks, policy: ChoicePolicy | NormalPolicy, given: Tensors) -> Tensors:
    """Return what acting remembers after these observations; its `action` [E, A] is the one that was chosen.

    given: observations as `obs/NAME` [E, *shape], `is_first` [E], noise as `mode_noise` has it, and what was remembered
    before: `memory` [E, M, D] with `filled` [E] tokens, the last latent `stoch` [E, S K] and `action` [E, A].
    """
    obs = {name: given[f"obs/{name}"] for name in as_mapping(model.obs_shape)}
    z = seen = model.see(obs, given["exponential_latent"])[1]
    before = [given[name] for name in ("memory", "filled", "stoch", "action", "is_first")]
    memory, filled, h = model.advance(*before)
    if model.config.act_on == "prior":  # the action does not depend on what is seen now, as published
        z = model.draw(model.log_probs(model.prior(h)), given["exponential_prior"])
    action = policy.sample(torch.cat([z, h], -1), given[policy.noise])
    return {"memory": memory, "filled": filled, "stoch": seen, "action": action}


def mode_noise(model: STORMNetworks, policy: ChoicePolicy | NormalPolicy, envs: int) -> dict[str, Tensor]:
    """Return the noise of a step by name, such that it gives every distribution's mode."""
    latents = ["exponential_latent", *(["exponential_prior"] if model.config.act_on == "prior" else [])]
    same = torch.ones(envs, model.config.stoch, model.config.classes)
    return {**dict.fromkeys(latents, same), policy.noise: policy.mode_noise((envs,))}
