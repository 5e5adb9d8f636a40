"""One step of acting with DreamerV3: filter an observation, then choose an action; and that step as a program."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from worldloom.capture import Tensors
from worldloom.dreamerv3.actor_critic import ContinuousPolicy, DiscretePolicy
from worldloom.dreamerv3.encoder import Encoder
from worldloom.dreamerv3.rssm import RSSM, RSSMState
from worldloom.dreamerv3.world_model import DreamerV3WorldModel
from worldloom.program import Program, example_obs

Policy = ContinuousPolicy | DiscretePolicy


@dataclass(frozen=True)
class Before:
    """Holds what acting knows before it sees the observation."""

    state: RSSMState  # [E, ...]
    action: Tensor  # [E, A], the previous one
    is_first: Tensor  # [E] bool: an episode starts, so the two above do not count


@dataclass(frozen=True)
class ActNoise:
    """The random numbers of one step; those of `likeliest` give the mode of every distribution."""

    latent: Tensor  # [E, S, K] standard exponential
    action: Tensor  # [E, A] standard normal for continuous actions, standard exponential for one-hot ones

    @classmethod
    def likeliest(cls, rssm: RSSM, before: Before, discrete: bool) -> ActNoise:
        """Return equal noise for all classes and none for normals: the likeliest latents, and the policy's mode."""
        action = torch.ones_like(before.action) if discrete else torch.zeros_like(before.action)
        return cls(torch.ones(len(action), rssm.stoch, rssm.classes, device=action.device), action)


def act_step(
    encoder: Encoder, rssm: RSSM, policy: Policy, obs: Mapping[str, Tensor], before: Before, noise: ActNoise
) -> tuple[RSSMState, Tensor]:
    """Return the posterior state after obs, and the action [E, A] that the policy chooses there.

    obs: [E, *shape] by key (Hafner et al. 2025, "Actor learning": the policy reads the posterior state).
    """
    embedded = rssm.embed_action(before.action * (~before.is_first).unsqueeze(-1))
    tokens = rssm.embed_tokens(encoder(obs))
    state, _ = rssm.observe_step(before.state, embedded, tokens, before.is_first, noise.latent)
    return state, policy.sample(state.features, noise.action)


class ActingModule(nn.Module):
    """`act_step` with inputs and outputs by name, of the parts of the model that acting needs.

    obs_names: input -> key of the observation. noise: the inputs of `ActNoise`; with () each distribution gives its
    mode.
    """

    def __init__(
        self, model: DreamerV3WorldModel, policy: Policy, obs_names: Mapping[str, str], noise: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.encoder, self.rssm, self.policy = copy.deepcopy((model.encoder, model.rssm, policy))
        self.obs_names, self.noise = dict(obs_names), noise

    def forward(self, **given: Tensor) -> Tensors:
        obs = {key: given[name] for name, key in self.obs_names.items()}
        before = Before(RSSMState(given["deter_in"], given["stoch_in"]), given["action_in"], given["is_first"])
        if self.noise:
            noise = ActNoise(*(given[name] for name in self.noise))
        else:
            noise = ActNoise.likeliest(self.rssm, before, isinstance(self.policy, DiscretePolicy))
        state, action = act_step(self.encoder, self.rssm, self.policy, obs, before, noise)
        return {"action": action, "deter_out": state.deter, "stoch_out": state.stoch, "action_out": action.clone()}


def acting_program(model: DreamerV3WorldModel, policy: Policy, envs: int, sample: bool) -> Program:
    """Return acting for `envs` environments as a program; its state is the RSSM's and the previous action."""
    c = model.config
    obs, obs_names = example_obs(model.obs_shape, envs, tuple(model.obs_classes))
    noise: dict[str, Tensor] = {}
    if sample:
        drawn = "exponential_action" if isinstance(policy, DiscretePolicy) else "normal_action"
        shapes = {"exponential_latent": (c.stoch, c.classes), drawn: (model.action_dim,)}
        noise = {name: torch.ones(envs, *shape) for name, shape in shapes.items()}
    inputs = {
        **obs,
        "is_first": torch.ones(envs, dtype=torch.bool),
        "deter_in": torch.zeros(envs, c.deter),
        "stoch_in": torch.zeros(envs, c.stoch, c.classes),
        "action_in": torch.zeros(envs, model.action_dim),
        **noise,
    }
    return Program(ActingModule(model, policy, obs_names, tuple(noise)), inputs)
