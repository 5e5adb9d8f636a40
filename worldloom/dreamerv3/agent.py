"""The DreamerV3 agent: it filters observations to act, and learns world model, policy and critic in one update."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from worldloom.arguments import check_act_state
from worldloom.capture import Tensors
from worldloom.dreamerv3.acting import ActNoise, Before, act_step, acting_program
from worldloom.dreamerv3.behaviour import Behaviour
from worldloom.dreamerv3.config import DreamerV3Config
from worldloom.dreamerv3.latents import compact, latent_columns
from worldloom.dreamerv3.learning import DreamerV3Learning, obs_columns
from worldloom.dreamerv3.rssm import RSSMState
from worldloom.dreamerv3.world_model import DreamerV3WorldModel
from worldloom.imagining import ImaginingAgent
from worldloom.nets import flatten, load_flat
from worldloom.observations import as_mapping
from worldloom.program import Program
from worldloom.types import ActState, Array, ColumnSpec, ObsArray, Precision, WindowSpec, split_obs


class DreamerV3Agent(ImaginingAgent):
    """An agent with a recurrent state for each environment; `worldloom.types.Agent` describes the methods.

    action_classes: the choices of each one-hot part of an action; () for continuous actions. Raises ValueError if the
    model embeds other actions.
    """

    random_warmup = False
    pretrain = False
    default_precision: Precision = "bfloat16"
    world_model: DreamerV3WorldModel
    behaviour: Behaviour
    learning: DreamerV3Learning

    def __init__(self, model: DreamerV3WorldModel, seed: int = 0, action_classes: tuple[int, ...] = ()) -> None:
        if model.config.representation == "ne" and model.action_classes != tuple(action_classes):
            raise ValueError(
                f"the model embeds actions of action_classes={model.action_classes}, but the agent chooses among "
                f"{tuple(action_classes)}. Make the model with the agent's action_classes."
            )
        behaviour = Behaviour(model, tuple(action_classes)).to(model.bins.device)
        super().__init__(model, behaviour, DreamerV3Learning(model, behaviour, seed + 1), action_classes, seed)

    # Facts that a run needs

    @property
    def config(self) -> DreamerV3Config:
        return self.world_model.config

    @property
    def batch_size(self) -> int:
        return self.config.batch_size

    @property
    def train_ratio(self) -> float:
        return self.config.train_ratio

    @property
    def windows(self) -> WindowSpec:
        """Windows of rows to train on, after one row for its stored latents if `learning.stored`."""
        context = int(self.learning.stored)
        return WindowSpec(self.config.batch_length + context, context, crosses_episodes=True, online_queue=True)

    @property
    def columns(self) -> Mapping[str, ColumnSpec]:
        return latent_columns(self.config)

    # Acting

    @torch.inference_mode()
    def act(
        self,
        obs: ObsArray,
        act_state: ActState | None,
        is_first: Array,
        explore: bool = True,  # noqa: ARG002 - the reference samples in evaluation too
    ) -> tuple[Array, ActState]:
        """Return actions [E, A] for obs [E, *obs_shape], one-hot or drawn from the normal and not clipped, and the new
        act_state. Raises ValueError for obs of other keys or shapes, or an act_state of another number of rows."""
        shown = {name: torch.as_tensor(value) for name, value in as_mapping(obs).items()}
        shown = self.world_model.as_mapping(shown, "act", 1)
        envs = len(next(iter(shown.values())))
        state = self._previous(act_state, envs)
        first = torch.as_tensor(is_first)
        found = self._act({**split_obs(shown), "is_first": first, **state})
        kept = {name: value.clone() for name, value in found.items()}  # the next call fills the same buffers
        return kept["action"].cpu().numpy(), kept

    def _choose(self, given: Tensors) -> Tensors:
        """Return the posterior state after these observations, and a drawn action; runs on the device alone."""
        model, policy, first = self.world_model, self.behaviour.policy, given["is_first"]
        obs = {name: given[column] for name, column in obs_columns(model).items()}
        before = Before(RSSMState(given["deter"], given["stoch"]), given["action"], first)
        latent = model.draw_noise(1, len(first), self.acting_generator)[0]
        noise = ActNoise(latent, policy.draw_noise((len(first),), self.acting_generator, self.device))
        state, action = act_step(model.encoder, model.rssm, policy, obs, before, noise)
        return {"deter": state.deter, "stoch": state.stoch, "action": action}

    def _previous(self, act_state: ActState | None, envs: int) -> dict[str, Tensor]:
        if act_state is None:
            state = self.world_model.rssm.initial(envs)
            action = torch.zeros(envs, self.world_model.action_dim, device=self.device)
            return {"deter": state.deter, "stoch": state.stoch, "action": action}
        check_act_state(act_state, envs)
        return dict(act_state)

    def replay_columns(self, act_state: ActState) -> dict[str, Array]:
        """Return the latents [E, ...] of the rows just acted on, as replay stores them; {} if it stores none."""
        if not self.learning.stored:
            return {}
        found = compact(RSSMState(act_state["deter"], act_state["stoch"]))
        return {name: value.cpu().numpy() for name, value in found.items()}

    # Exchange

    def _acting_parameters(self) -> list[Tensor]:
        modules: list[nn.Module] = [self.world_model.encoder, self.world_model.rssm, self.behaviour.policy]
        return [parameter.detach() for module in modules for parameter in module.parameters()]

    def acting_weights(self) -> Array:
        return flatten(self._acting_parameters())

    def load_acting_weights(self, flat: Array) -> None:
        load_flat(self._acting_parameters(), flat)

    def acting_program(self, envs: int, sample: bool, plan: bool | None = None) -> Program:
        """Return acting as a function of tensors, for `worldloom.export`. Raises ValueError for plan=True: the policy
        acts without a search."""
        if plan:
            raise ValueError("export: plan is True, but DreamerV3 acts with its policy. Leave it out.")
        return acting_program(self.world_model, self.behaviour.policy, envs, sample)
