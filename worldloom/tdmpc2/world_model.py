"""TD-MPC2's world model: its networks behind the API that all families share (`worldloom.types.WorldModel`)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from worldloom.arguments import check_batch
from worldloom.optim import move_towards
from worldloom.pretrained import save_model
from worldloom.tdmpc2.config import TDMPC2Config
from worldloom.tdmpc2.losses import cut_windows, draw_loss_noise, joint_loss
from worldloom.tdmpc2.networks import TDMPC2Networks
from worldloom.tdmpc2.tasks import Task
from worldloom.types import Batch, LatentState, Obs, ObsShape, Trajectory


class TDMPC2WorldModel(TDMPC2Networks):
    """Encoder, latent dynamics, reward, policy prior, value ensemble and, if episodic, termination.

    obs_shape: (V,) float32 vectors, or (C, H, W) images, published as 9x64x64: three frames, the oldest first. Actions
    are continuous, in [-1, 1], or one-hot, where action_classes is the number of choices of each part (an extension of
    ours). episode_length: agent steps, which set gamma.
    tasks: those of a multi-task model, in the order of their numbers; observations of smaller tasks are filled up with
    zeros, and so are actions. Raises ValueError for other observations, and for arguments that contradict each other.
    """

    def __init__(
        self,
        obs_shape: ObsShape,
        action_dim: int,
        config: TDMPC2Config | None = None,
        episode_length: int | None = None,
        tasks: Sequence[Task] = (),
        action_classes: Sequence[int] = (),
    ) -> None:
        super().__init__(obs_shape, action_dim, config or TDMPC2Config(), episode_length, tasks, action_classes)

    def encode(self, obs: Obs, task: Tensor | None = None) -> LatentState:
        """Return z of obs [B, V], or [B, C, H, W] (uint8, or floats in [0, 1]).

        task: [B] task numbers, for a multi-task model. Raises ValueError for other shapes.
        """
        task = self.task_numbers(task, len(obs))
        shown = self.check_observation("encode", obs, task)
        return LatentState(self.latent(shown, task, self.draw_eval_shifts(len(shown))), task=task)

    def predict(self, state: LatentState, action: Tensor) -> LatentState:
        self.check_action("predict", action, (state.batch_size,))
        return LatentState(self.next_latent(state.deterministic, action), task=state.task)

    def observe(self, state: LatentState, action: Tensor, obs: Obs) -> LatentState:
        """Encode obs alone: TD-MPC2 keeps no memory, so what it observes replaces what it predicted."""
        self.check_action("observe", action, (state.batch_size,))
        return self.encode(obs, state.task)

    def decode(self, state: LatentState) -> dict[str, Any]:
        """Return `obs` (None: there is no decoder), `action` [B, A] (the policy's mean), `reward` [B, 1] and `q_values`
        [B, N] of that action, and `continue` [B, 1], a probability."""
        z = state.deterministic
        zeros = torch.zeros(len(z), self.action_dim, device=z.device)
        action = self.policy.sample(z, zeros, self.action_mask(state.task)).mean_action
        return {
            "obs": None,
            "reward": self.predict_reward(z, action).unsqueeze(-1),
            "continue": (1 - self.terminates(z)).unsqueeze(-1),
            "q_values": self.values(z, action).movedim(0, -1),
            "action": action,
        }

    def imagine(self, state: LatentState, actions: Tensor) -> Trajectory:
        self.check_action("imagine", actions, (actions.shape[0], state.batch_size))
        states, rewards, continues = [state], [], []
        for action in actions:
            z = states[-1].deterministic
            rewards.append(self.predict_reward(z, action))
            states.append(LatentState(self.next_latent(z, action), task=state.task))
            continues.append(1 - self.terminates(states[-1].deterministic))
        return Trajectory(tuple(states), torch.stack(rewards).unsqueeze(-1), torch.stack(continues).unsqueeze(-1))

    def initial_state(self, batch_size: int) -> LatentState:
        """Return uniform simplices, SimNorm of zeros. Raises ValueError for a model of several tasks (use `encode`)."""
        if len(self.tasks) > 1:
            raise ValueError("initial_state: this model knows several tasks. Use encode(obs, task).")
        z = torch.full((batch_size, self.config.latent_dim), 1 / self.config.simnorm_dim, device=self.bins.device)
        task = self.task_numbers(None, batch_size)
        if self.task_embedding is not None and task is not None:
            z = torch.cat([z, self.task_embedding(task)], -1)
        return LatentState(z, task=task)

    def compute_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return `loss` and its parts `consistency_loss`, `reward_loss`, `value_loss`, `termination_loss`: scalars.

        batch: T >= 2 rows of one episode each; more than horizon + 1 rows are cut into windows of that length, which
        share their end rows. The policy has a loss of its own (`TDMPC2Agent.update`). After a step of an optimiser on
        this loss, call `update_targets`. Raises ValueError for other shapes.
        """
        check_batch(batch)
        batch = cut_windows(batch, self.config.horizon)
        found = joint_loss(self, batch, draw_loss_noise(self, *batch["actions"].shape[:2]))
        names = [field.name for field in dataclasses.fields(found) if field.name != "latents"]
        return {name: getattr(found, name) for name in names}

    def update_targets(self, made: Tensor | None = None) -> None:
        """Move target value heads: target += tau (online - target); made: bool scalar, where False leaves them."""
        rate = torch.full((), self.config.tau, device=self.bins.device)
        rate = rate if made is None else rate * made
        move_towards(self.target_q.parameters(), self.q.parameters(), rate)

    def with_task(self, task: Task, like: str) -> TDMPC2WorldModel:
        """Return a copy of this multi-task model with one more task, whose embedding is that of the task named `like`.

        A start for fine-tuning. Raises ValueError for an unknown `like`, a taken name or too many action dimensions.
        """
        names = [known.name for known in self.tasks]
        if like not in names or task.name in names:
            raise ValueError(f"with_task: {task.name!r} like {like!r}, expected a new name like one of {names}.")
        tasks = (*self.tasks, task)
        wider = TDMPC2WorldModel(self.obs_shape, self.action_dim, self.config, self.episode_length, tasks)
        state, key = self.state_dict(), "task_embedding.weight"
        wider.load_state_dict({**state, key: torch.cat([state[key], state[key][names.index(like)].unsqueeze(0)])})
        return wider.to(self.bins.device)

    def for_task(
        self, name: str, like: str, obs_shape: ObsShape, action_dim: int, episode_length: int | None
    ) -> TDMPC2WorldModel:
        """Return a copy of this multi-task model that knows one task alone, whose embedding is that of the task `like`.

        The start of fine-tuning on a new task (Hansen et al. 2024, "few-shot learning"), or on one of its own.
        obs_shape, action_dim: the task's own; inputs and actions that this model would fill up with zeros are cut off,
        which changes no output. episode_length: agent steps. Raises ValueError for an unknown `like`, or a task that is
        too large.
        """
        return one_task(self, name, like, obs_shape, action_dim, episode_length)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        save_model(directory, self.describe(), self)

    def describe(self) -> dict[str, Any]:
        return {
            "family": "tdmpc2",
            "obs_shape": list(self.obs_shape),
            "action_dim": self.action_dim,
            "episode_length": self.episode_length,
            "action_classes": list(self.action_classes),
            "tasks": [dataclasses.asdict(task) for task in self.tasks],
            "config": dataclasses.asdict(self.config),
        }


def one_task(
    model: TDMPC2WorldModel, name: str, like: str, obs_shape: ObsShape, action_dim: int, episode_length: int | None
) -> TDMPC2WorldModel:
    """Return what `TDMPC2WorldModel.for_task` returns."""
    names, (most,), size = [task.name for task in model.tasks], model.obs_shape, model.action_dim
    if like not in names:
        raise ValueError(f"for_task: there is no task {like!r} to start from, expected one of: {', '.join(names)}.")
    shape = tuple(cast(Sequence[int], obs_shape))
    if isinstance(obs_shape, Mapping) or len(shape) != 1 or shape[0] > most or action_dim > size:
        raise ValueError(
            f"for_task: {name} shows {obs_shape} and takes {action_dim} action dimensions, but this model reads up to "
            f"{most} numbers and acts with up to {size} dimensions."
        )
    task = Task(name, action_dim, episode_length)
    made = TDMPC2WorldModel(shape, action_dim, model.config, task.episode_length, (task,))
    state, wide = dict(model.state_dict()), model.config.latent_dim + model.config.task_dim
    first = state["encoder.0.weight"]  # reads the observation, then the embedding
    state["encoder.0.weight"] = torch.cat([first[:, : shape[0]], first[:, most:]], 1)
    for key in ("dynamics.0.weight", "reward.0.weight", "q.first.weight", "target_q.first.weight"):
        state[key] = state[key][..., : wide + action_dim]  # they read latent, embedding, action
    for key in ("policy.2.weight", "policy.2.bias"):  # means of all action dimensions, then their deviations
        mean, raw = state[key].chunk(2)
        state[key] = torch.cat([mean[:action_dim], raw[:action_dim]])
    state["task_embedding.weight"] = state["task_embedding.weight"][names.index(like)].unsqueeze(0)
    made.load_state_dict(state)
    return made.to(model.bins.device)
