"""The TD-MPC2 agent: it plans to act, and learns model, values and policy in one update."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from worldloom.arguments import check_act_state
from worldloom.capture import Captured, Tensors
from worldloom.generators import restore_generator
from worldloom.learner import Learner
from worldloom.nets import flatten, load_flat
from worldloom.program import Program
from worldloom.staging import Columns
from worldloom.tdmpc2.config import TDMPC2Config
from worldloom.tdmpc2.learning import TDMPC2Learning
from worldloom.tdmpc2.planner import Planner
from worldloom.tdmpc2.programs import planner_program, policy_program
from worldloom.tdmpc2.world_model import TDMPC2WorldModel
from worldloom.types import ActState, Array, Batch, ColumnSpec, Metrics, ObsArray, Precision, WindowSpec

NOT_EPISODIC = (
    "warning: episodes end truly here (terminated), but the model has no termination head, so its plans look past the "
    "end. Set agent.episodic: true, and agent.rho: 0.7, as the authors do on such tasks (configs/tdmpc2_mujoco.yaml)."
)


class TDMPC2Agent:
    """An agent for vectors or images, with continuous or one-hot actions; `worldloom.types.Agent` explains its methods.

    Raises ValueError for action classes that are not the model's.
    """

    behaviour = None  # the world model holds policy and values
    random_warmup = True
    default_precision: Precision = "float32"

    def __init__(self, model: TDMPC2WorldModel, seed: int = 0, action_classes: tuple[int, ...] = ()) -> None:
        if tuple(action_classes) != model.action_classes:
            raise ValueError(f"action_classes is {action_classes}, expected the model's, {model.action_classes}.")
        self.world_model, self.planner, self.device = model, Planner(model), model.bins.device
        self.acting_generator = torch.Generator(self.device).manual_seed(seed)
        self._act = Captured(self._choose, self.device, self.acting_generator)
        self._learner = Learner(partial(TDMPC2Learning, model, seed + 1), self.device)

    # Facts that a run needs

    @property
    def config(self) -> TDMPC2Config:
        return self.world_model.config

    @property
    def batch_size(self) -> int:
        return self.config.batch_size

    @property
    def windows(self) -> WindowSpec:
        return WindowSpec(length=self.config.horizon + 1, context=1, crosses_episodes=False)

    @property
    def columns(self) -> Mapping[str, ColumnSpec]:
        return {"task": ColumnSpec((), "int32")} if len(self.world_model.tasks) > 1 else {}

    @property
    def train_ratio(self) -> float:
        """Replayed steps per environment step: one update for each environment step, as published."""
        return float(self.config.batch_size * self.config.horizon)

    @property
    def pretrain(self) -> bool:
        return self.config.pretrain

    @property
    def plans(self) -> bool:
        return self.config.mpc

    @property
    def true_ends_hint(self) -> str | None:
        return None if self.config.episodic else NOT_EPISODIC

    @property
    def updates(self) -> int:
        return self._learner.updates

    def configure_learning(self, precision: Precision, compiled: bool, capture: bool = True) -> None:
        """Compile, if `compiled`, the losses of model and policy, and on a GPU an iteration of the planner (on a CPU
        that gains nothing); capture makes each call one CUDA graph. Raises ValueError unless precision is float32."""
        if precision != "float32":
            raise ValueError(f"train.precision is {precision!r}, but TD-MPC2 learns in float32, as published.")
        cuda = self.device.type == "cuda"
        self._learner.captured.enabled = self._act.enabled = capture and cuda
        if compiled:
            self.learning.compile()
        if compiled and cuda:
            self.planner.compile()

    # Acting

    @torch.inference_mode()
    def act(
        self,
        obs: ObsArray,
        act_state: ActState | None,
        is_first: Array,
        explore: bool = True,
        task: Array | None = None,
    ) -> tuple[Array, ActState]:
        """Return actions [E, A] in [-1, 1] or one-hot for obs [E, *obs_shape], and the new act_state, the last plans.

        task: [E] task numbers, for a multi-task model; action dimensions that a task does not use are zero. Raises
        ValueError for obs, task or act_state of other shapes.
        """
        numbers = None if task is None else torch.as_tensor(task).long()
        numbers = self.world_model.task_numbers(numbers, len(is_first))
        shown = self.world_model.check_observation("act", torch.as_tensor(obs), numbers)
        if act_state is None:
            previous = torch.zeros(len(shown), self.config.horizon, self.world_model.action_dim, device=self.device)
        else:
            check_act_state(act_state, len(shown))
            previous = act_state["mean"]
        given = {"obs": shown, "is_first": torch.as_tensor(is_first), "mean": previous}
        found = self._act.own(self._act(given if numbers is None else {**given, "task": numbers}, explore=explore))
        return found["action"].cpu().numpy(), {"mean": found["mean"]}

    def _choose(self, given: Tensors, explore: bool) -> Tensors:
        """Return actions and plans for these observations; runs on the device alone."""
        model, task = self.world_model, given.get("task")
        z = model.latent(given["obs"], task, model.draw_eval_shifts(len(given["obs"]), self.acting_generator))
        noise = self.planner.draw_noise(len(z), self.acting_generator)
        mean = given["mean"] * ~given["is_first"][:, None, None]
        if self.config.mpc:
            action, mean = self.planner.plan(z, mean, noise, explore, task)
        else:
            action = model.policy_action(z, noise.explore if explore else None, task)
        return {"action": action, "mean": mean}

    def replay_columns(self, act_state: ActState) -> dict[str, Array]:  # noqa: ARG002 - the protocol's argument
        """Return {}: acting makes nothing for replay to store."""
        return {}

    # Learning

    @property
    def learning(self) -> TDMPC2Learning:
        """Return the update, made at its first use."""
        return self._learner.update

    def update(self, batch: Batch) -> tuple[Metrics, dict[str, Array]]:
        """Make one update: world model, then policy, then target values (Hansen et al. 2024, algorithm 2).

        A step of the world model or of the policy whose loss or gradient is not finite changes nothing. Raises
        FloatingPointError after several of them in a row, ValueError for a batch of other keys or shapes.
        """
        columns = self.learn(batch)
        return self.collect(), columns.arrays()

    def learn(self, batch: Batch) -> Columns:
        """Make an update without waiting for the device; the returned columns are empty."""
        return self._learner.learn(batch)

    def collect(self) -> Metrics:
        """Return means since the last call. Waits for the device. Raises FloatingPointError as `update`."""
        means = self._learner.collect()
        return {**means, "update_norm": self.learning.model_optimizer.update_norm().item()}

    # Exchange

    def _acting_parameters(self) -> list[Tensor]:
        model = self.world_model
        modules: list[nn.Module] = [model.encoder, model.policy]
        if self.config.mpc:
            modules += [model.dynamics, model.reward, model.q]
            modules += [] if model.termination is None else [model.termination]
        modules += [] if model.task_embedding is None else [model.task_embedding]
        return [parameter.detach() for module in modules for parameter in module.parameters()]

    def acting_weights(self) -> Array:
        return flatten(self._acting_parameters())

    def load_acting_weights(self, flat: Array) -> None:
        load_flat(self._acting_parameters(), flat)

    def acting_program(self, envs: int, sample: bool, plan: bool | None = None) -> Program:
        """Return acting as a function of tensors, for `worldloom.export`: planning, or the policy prior alone."""
        make = planner_program if (self.plans if plan is None else plan) else policy_program
        return make(self.world_model, envs, sample)

    def describe(self) -> dict[str, Any]:
        return self.world_model.describe()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.world_model.state_dict(),
            **self.learning.state_dict(),
            "updates": self.updates,
            "acting_generator": self.acting_generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.world_model.load_state_dict(state["model"])
        self.learning.load_state_dict(state)
        restore_generator(self.acting_generator, state["acting_generator"])
        self._learner.resume(int(state["updates"]))
