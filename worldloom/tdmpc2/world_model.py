"""TD-MPC2's world model: its networks behind the API that all families share (`worldloom.types.WorldModel`)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

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
        """Return uniform simplices, SimNorm of zeros. Raises ValueError for a multi-task model (use `encode`)."""
        if self.tasks:
            raise ValueError("initial_state: this model knows several tasks. Use encode(obs, task).")
        z = torch.full((batch_size, self.config.latent_dim), 1 / self.config.simnorm_dim)
        return LatentState(z.to(self.bins.device))

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
