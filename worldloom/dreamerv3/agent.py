"""The DreamerV3 agent: it filters observations to act, and learns world model, policy and critic in one update."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from worldloom.capture import Tensors
from worldloom.dreamerv3.acting import ActNoise, Before, act_step, acting_program
from worldloom.dreamerv3.behaviour import Behaviour
from worldloom.dreamerv3.config import DreamerV3Config
from worldloom.dreamerv3.latents import compact, latent_columns
from worldloom.dreamerv3.learning import DreamerV3Learning, obs_columns
from worldloom.dreamerv3.rssm import RSSMState
from worldloom.dreamerv3.world_model import DreamerV3WorldModel
from worldloom.imagining import ImaginingAgent
from worldloom.program import Program, refuse_plan
from worldloom.types import ActState, Array, ColumnSpec, Precision, WindowSpec


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
        super().__init__(model, behaviour, DreamerV3Learning, action_classes, seed)

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
        """Windows of rows to train on, after one row for its latents if replay stores them."""
        context = int(bool(self.columns))
        return WindowSpec(self.config.batch_length + context, context, crosses_episodes=True, online_queue=True)

    @property
    def columns(self) -> Mapping[str, ColumnSpec]:
        return latent_columns(self.config)

    # Acting

    def _choose(self, given: Tensors) -> Tensors:
        """Return the posterior state after these observations, and a drawn action; runs on the device alone."""
        model, policy, first = self.world_model, self.behaviour.policy, given["is_first"]
        obs = {name: given[column] for name, column in obs_columns(model).items()}
        before = Before(RSSMState(given["deter"], given["stoch"]), given["action"], first)
        latent = model.draw_noise(1, len(first), self.acting_generator)[0]
        noise = ActNoise(latent, policy.draw_noise((len(first),), self.acting_generator, self.device))
        state, action = act_step(model.encoder, model.rssm, policy, obs, before, noise)
        return {"deter": state.deter, "stoch": state.stoch, "action": action}

    def _fresh(self, envs: int) -> dict[str, Tensor]:
        state = self.world_model.rssm.initial(envs)
        action = torch.zeros(envs, self.world_model.action_dim, device=self.device)
        return {"deter": state.deter, "stoch": state.stoch, "action": action}

    def replay_columns(self, act_state: ActState) -> dict[str, Array]:
        """Return the latents [E, ...] of the rows just acted on, as replay stores them; {} if it stores none."""
        if not self.columns:
            return {}
        found = compact(RSSMState(act_state["deter"], act_state["stoch"]))
        return {name: value.cpu().numpy() for name, value in found.items()}

    # Exchange

    def _acting_tensors(self) -> list[Tensor]:
        modules: list[nn.Module] = [self.world_model.encoder, self.world_model.rssm, self.behaviour.policy]
        return [parameter.detach() for module in modules for parameter in module.parameters()]

    def acting_program(self, envs: int, sample: bool, plan: bool | None = None) -> Program:
        """Return acting as a function of tensors, for `worldloom.export`. Raises ValueError for plan=True: the policy
        acts without a search."""
        refuse_plan(plan, "DreamerV3")
        return acting_program(self.world_model, self.behaviour.policy, envs, sample)
