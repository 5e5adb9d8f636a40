"""The STORM agent: it keeps the last tokens to act, and learns world model, policy and critic in one update."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from worldloom.capture import Tensors
from worldloom.imagining import ImaginingAgent
from worldloom.program import Program, refuse_plan, step_program
from worldloom.storm.acting import ActStep, act_step, mode_noise
from worldloom.storm.behaviour import Behaviour
from worldloom.storm.learning import STORMLearning
from worldloom.storm.world_model import STORMWorldModel
from worldloom.types import ColumnSpec, Metrics, Precision, WindowSpec


class STORMAgent(ImaginingAgent):
    """An agent with a short memory of tokens for each environment; `worldloom.types.Agent` describes the methods.

    action_classes: the choices of each one-hot part of an action; () for continuous actions.
    """

    random_warmup = True
    pretrain = False
    reads_lost_lives = True
    columns: Mapping[str, ColumnSpec] = {}
    default_precision: Precision = "bfloat16"
    world_model: STORMWorldModel
    behaviour: Behaviour
    learning: STORMLearning

    def __init__(self, model: STORMWorldModel, seed: int = 0, action_classes: tuple[int, ...] = ()) -> None:
        self.config = c = model.config
        self.batch_size, self.train_ratio = c.batch_size, c.train_ratio
        # the row before those that are trained gives the latent that the first token is made of
        self.windows = WindowSpec(c.batch_length + 1, context=1, crosses_episodes=True)
        behaviour = Behaviour(c, model.action_dim, tuple(action_classes)).to(model.bins.device)
        super().__init__(model, behaviour, STORMLearning, action_classes, seed)

    # Acting

    def _choose(self, given: Tensors) -> Tensors:
        """Return the memory after these observations, and a drawn action; runs on the device alone."""
        model, policy, generator = self.world_model, self.behaviour.policy, self.acting_generator
        rows = len(given["stoch"])
        noise = {"exponential_latent": model.draw_noise(rows, generator=generator)}
        if self.config.act_on == "prior":
            noise["exponential_prior"] = model.draw_noise(rows, generator=generator)
        noise[policy.noise] = policy.draw_noise((rows,), generator, self.device)
        return act_step(model, policy, {**given, **noise})

    def _fresh(self, envs: int) -> dict[str, Tensor]:
        memory, filled = self.world_model.empty_memory(envs)
        stoch = torch.zeros(envs, self.config.stoch * self.config.classes, device=self.device)
        action = torch.zeros(envs, self.world_model.action_dim, device=self.device)
        return {"memory": memory, "filled": filled, "stoch": stoch, "action": action}

    # Learning

    def collect(self) -> Metrics:
        """Return means since the last call. Waits for the device. Raises FloatingPointError as `update`."""
        return {**super().collect(), "update_norm": self.learning.world_optimizer.update_norm().item()}

    # Exchange

    def _acting_tensors(self) -> list[Tensor]:
        model = self.world_model
        modules: list[nn.Module] = [model.encoder, model.posterior, model.stem, model.transformer, model.prior]
        modules.append(self.behaviour.policy)
        return [t.detach() for module in modules for t in [*module.parameters(), *module.buffers()]]

    def acting_program(self, envs: int, sample: bool, plan: bool | None = None) -> Program:
        """Return acting as a function of tensors, for `worldloom.export`. Raises ValueError for plan=True."""
        refuse_plan(plan, "STORM")
        model, policy = self.world_model, self.behaviour.policy
        noise = mode_noise(model, policy, envs)
        return step_program(ActStep(model, policy), model.obs_shape, envs, self._fresh(envs), noise, sample)
