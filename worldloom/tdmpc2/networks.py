"""TD-MPC2's networks (Hansen, Su & Wang 2024, https://arxiv.org/abs/2310.16828, section 3 and table 7).

They read latents z [..., D + T] and actions [..., A]; one latent [E, 1, D + T] may serve [E, S, A]. In a multi-task
model, the last T entries of a latent are the embedding of its task, which every network reads; else T is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from worldloom import functional as fn
from worldloom.nets import Ensemble, SimNorm, mlp, mlp_of_pair
from worldloom.tdmpc2.config import TDMPC2Config
from worldloom.tdmpc2.pixels import PixelEncoder, draw_shifts
from worldloom.tdmpc2.policy import CategoricalPolicy, GaussianPolicy
from worldloom.tdmpc2.tasks import Task, TaskEmbedding
from worldloom.types import Obs, ObsShape

BRIGHT = 16.0  # no float image in [0, 1] reaches this, not even a noisy one


class TDMPC2Networks(nn.Module):
    """Encoder, latent dynamics, reward, policy prior, value ensemble and, if episodic, termination.

    See `TDMPC2WorldModel` for the arguments. Raises ValueError if they do not fit.
    """

    bins: Tensor

    def __init__(
        self,
        obs_shape: ObsShape,
        action_dim: int,
        config: TDMPC2Config,
        episode_length: int | None,
        tasks: Sequence[Task],
        action_classes: Sequence[int],
    ) -> None:
        super().__init__()
        _check(obs_shape, action_dim, config, tasks, action_classes)
        c, shape = config, tuple(cast(Sequence[int], obs_shape))
        self.config, self.obs_shape, self.action_dim, self.episode_length = c, shape, action_dim, episode_length
        wide = c.latent_dim + c.task_dim  # a latent and the embedding of its task
        joint, hidden = wide + action_dim, [c.mlp_dim] * 2
        self.encoder: nn.Module
        if self.pixels:
            self.encoder = PixelEncoder(shape, c.latent_dim, c.simnorm_dim)
        else:
            encoder_sizes = [shape[0] + c.task_dim] + [c.encoder_dim] * max(c.encoder_layers - 1, 1)
            self.encoder = mlp(encoder_sizes, c.latent_dim, SimNorm(c.simnorm_dim))
        self.dynamics = mlp([joint, *hidden], c.latent_dim, SimNorm(c.simnorm_dim))
        self.reward = mlp([joint, *hidden], c.num_bins)
        self.policy: GaussianPolicy | CategoricalPolicy
        if action_classes:
            self.policy = CategoricalPolicy([wide, *hidden], action_classes)
        else:
            self.policy = GaussianPolicy([wide, *hidden], action_dim, (c.log_std_min, c.log_std_max))
        self.q = Ensemble(c.num_q, joint, c.mlp_dim, c.num_bins)
        self.termination = mlp([wide, *hidden], 1) if c.episodic else None
        self.task_embedding = TaskEmbedding(tasks, action_dim, c) if tasks else None
        self._initialise()
        self.target_q = Ensemble(c.num_q, joint, c.mlp_dim, c.num_bins).requires_grad_(False)
        self.target_q.load_state_dict(self.q.state_dict())
        self.register_buffer("bins", torch.linspace(-c.bin_limit, c.bin_limit, c.num_bins), persistent=False)

    def _initialise(self) -> None:
        """Draw weights from N(0, 0.02^2), set biases and the last weights of reward and values to zero."""
        for name, parameter in self.named_parameters():
            if ".ln." in name or ".convs." in name:  # norms and convolutions keep torch's own initialisation
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02)  # the bounds -2 and 2 are absolute: 100 sigma
        last_reward: Any = self.reward[-1]
        nn.init.zeros_(last_reward.weight)
        nn.init.zeros_(self.q.output.weight)
        if self.task_embedding is not None:
            nn.init.uniform_(self.task_embedding.weight, -0.02, 0.02)

    @property
    def pixels(self) -> bool:
        """True if observations are images."""
        return len(self.obs_shape) == 3

    @property
    def tasks(self) -> tuple[Task, ...]:
        return () if self.task_embedding is None else self.task_embedding.tasks

    @property
    def action_classes(self) -> tuple[int, ...]:
        """The number of choices of each part of a one-hot action; () for continuous actions."""
        return self.policy.classes

    @property
    def discount(self) -> float:
        """gamma of a single task, from the length of its episodes; see `TDMPC2Config.discount_for`."""
        return self.config.discount_for(self.episode_length)

    def discounts(self, task: Tensor | None) -> Tensor | float:
        """Return gamma of each task [...]: [...], or a number for a single task."""
        if self.task_embedding is None or task is None:
            return self.discount
        return self.task_embedding.discounts[task]

    def action_mask(self, task: Tensor | None) -> Tensor | None:
        """Return [..., A], 1 for the action dimensions that each task [...] uses; None for a single task."""
        if self.task_embedding is None or task is None:
            return None
        return self.task_embedding.action_masks[task]

    def latent(self, obs: Tensor, task: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Return z = h(s, e), [..., D + T], of observations [..., *obs_shape] and task numbers [...].

        shift: [..., 2] moves images, see `draw_shifts`.
        """
        if self.pixels:
            return cast(Tensor, self.encoder(obs, shift))
        x = fn.symlog(obs.float()) if self.config.symlog_obs else obs.float()
        if self.task_embedding is None:
            return cast(Tensor, self.encoder(x))
        assert task is not None
        embedded = self.task_embedding(task)
        return torch.cat([self.encoder(torch.cat([x, embedded], -1)), embedded], -1)

    def with_task_embedding(self, z: Tensor, task: Tensor | None) -> Tensor:
        """Return latents [B, H+1, D + T] with their tasks' current embeddings, detached, for the policy's update."""
        if task is None or self.task_embedding is None:
            return z
        embedded = self.task_embedding(task).detach()[:, None].expand(-1, z.shape[1], -1)
        return torch.cat([z[..., : self.config.latent_dim], embedded], -1)

    def next_latent(self, z: Tensor, action: Tensor) -> Tensor:
        """Return z' = d(z, a, e), [..., D + T]."""
        new = mlp_of_pair(self.dynamics, z, action)
        if self.task_embedding is None:
            return new
        return torch.cat([new, z[..., self.config.latent_dim :].expand(*new.shape[:-1], -1)], -1)

    def predict_reward(self, z: Tensor, action: Tensor) -> Tensor:
        """Return r = R(z, a, e), [...], the reward of the move out of z."""
        return fn.symlog_mean(mlp_of_pair(self.reward, z, action), self.bins)

    def values(self, z: Tensor, action: Tensor, heads: Tensor | None = None) -> Tensor:
        """Return q = Q(z, a, e), [N, ...], of the online heads without dropout, or [N', ...] of `heads` [N'] only."""
        return fn.symlog_mean(self.q(torch.cat([z, action], -1), heads), self.bins)

    def policy_action(self, z: Tensor, noise: Tensor | None, task: Tensor | None = None) -> Tensor:
        """Return the policy prior's action [E, A] at z [E, D + T]: drawn with noise [E, A], standard normal, or without
        noise its mean, which of choices is the likeliest."""
        zeros = torch.zeros(len(z), self.action_dim, device=z.device)
        sample = self.policy.sample(z, zeros if noise is None else noise, self.action_mask(task))
        return sample.mean_action if noise is None else sample.action

    def terminates(self, z: Tensor) -> Tensor:
        """Return the chance [...] that the episode truly ends on arriving at z; zeros without a termination head."""
        if self.termination is None:
            return torch.zeros(z.shape[:-1], device=z.device)
        return torch.sigmoid(self.termination(z)).squeeze(-1)

    # Random numbers of losses and plans

    def draw_dropped(self, lead: tuple[int, ...], generator: Generator | None = None) -> Tensor | None:
        """Draw bools [*lead, M], True where dropout zeroes the heads' first layer of M; None without dropout."""
        c = self.config
        return fn.random_mask((*lead, c.mlp_dim), c.dropout, generator, self.bins.device) if c.dropout > 0 else None

    def draw_heads(self, count: int, generator: Generator | None = None) -> Tensor:
        """Draw [count, 2]: two distinct value heads for each of `count` uses."""
        return two_heads(torch.rand(count, self.config.num_q, device=self.bins.device, generator=generator))

    def draw_eval_shifts(self, count: int, generator: Generator | None = None) -> Tensor | None:
        """Draw shifts [count, 2] for images in acting and evaluation; None if these stay as they are."""
        if not (self.pixels and self.config.augment_eval):
            return None
        return draw_shifts((count,), self.bins.device, generator)

    # Checks of inputs

    def check_observation(self, where: str, obs: Obs, task: Tensor | None) -> Tensor:
        """Return obs [B, *obs_shape], padded with zeros if a model of several tasks is given fewer numbers.

        Raises ValueError for another shape or range, or a task [B] that does not fit.
        """
        if self.tasks and isinstance(obs, Tensor) and obs.ndim == 2 and obs.shape[1] < self.obs_shape[0]:
            obs = F.pad(obs, (0, self.obs_shape[0] - obs.shape[1]))
        if not isinstance(obs, Tensor) or tuple(obs.shape[1:]) != self.obs_shape:
            found = tuple(obs.shape) if isinstance(obs, Tensor) else f"a mapping of {sorted(obs)}"
            raise ValueError(f"{where}: obs is {found}, expected [B, {', '.join(map(str, self.obs_shape))}].")
        if self.pixels and obs.is_floating_point() and obs.numel() and obs.max() > BRIGHT:
            raise ValueError(f"{where}: images are floats up to {obs.max():.0f}, expected uint8, or floats in [0, 1].")
        self.check_task(where, task, len(obs))
        self.check_task_numbers(where, task)
        return obs

    def task_numbers(self, task: Tensor | None, count: int) -> Tensor | None:
        """Return task [count]; zeros in place of None for a model that knows one task, which needs no numbers."""
        if task is None and len(self.tasks) == 1:
            return torch.zeros(count, dtype=torch.int64, device=self.bins.device)
        return task

    def check_task(self, where: str, task: Tensor | None, count: int) -> None:
        """Check that task is [count] for a multi-task model, else None. Raises ValueError otherwise."""
        if self.tasks and task is None:
            raise ValueError(f"{where}: this model knows {len(self.tasks)} tasks, expected their numbers, task [B].")
        if task is not None and not self.tasks:
            raise ValueError(f"{where}: task was given, but this model knows a single task. Leave it out.")
        if task is not None and tuple(task.shape) != (count,):
            raise ValueError(f"{where}: task is {tuple(task.shape)}, expected ({count},).")

    def check_task_numbers(self, where: str, task: Tensor | None) -> None:
        """Raises ValueError for a number of no task; reads them on the host."""
        if task is None or task.is_meta or not task.numel():
            return
        if not 0 <= int(task.min()) <= int(task.max()) < len(self.tasks):
            found = f"{int(task.min())} to {int(task.max())}"
            raise ValueError(f"{where}: task numbers are {found}, expected 0 to {len(self.tasks) - 1}.")

    def check_action(self, where: str, action: Tensor, lead: tuple[int, ...]) -> None:
        """Check that action is [*lead, A]. Raises ValueError otherwise."""
        expected = (*lead, self.action_dim)
        if tuple(action.shape) != expected:
            raise ValueError(f"{where}: actions are {tuple(action.shape)}, expected {expected}.")


def two_heads(uniform: Tensor) -> Tensor:
    """Return two distinct value heads [n, 2] for each row of uniform numbers [n, N]; all pairs are equally likely."""
    return uniform.argsort(1)[:, :2]


def _check(
    obs_shape: ObsShape, action_dim: int, config: TDMPC2Config, tasks: Sequence[Task], action_classes: Sequence[int]
) -> None:
    if isinstance(obs_shape, Mapping) or len(obs_shape) not in (1, 3) or min(obs_shape) < 1:
        raise ValueError(
            f"TD-MPC2 reads vectors or images: obs_shape is {obs_shape}, expected (V,) or (C, H, W). Flatten the "
            "observation."
        )
    if len(obs_shape) == 3 and tasks:
        raise ValueError(f"obs_shape is {obs_shape} with {len(tasks)} tasks, expected vectors (V,) for several tasks.")
    if action_dim < 1:
        raise ValueError(f"action_dim is {action_dim}, expected at least 1.")
    if action_classes and (sum(action_classes) != action_dim or tasks):
        raise ValueError(
            f"action_classes {tuple(action_classes)} with action_dim {action_dim} and {len(tasks)} tasks, expected "
            "classes that sum to action_dim, and a single task."
        )
    if action_classes and config.entropy_coef == 0:
        raise ValueError(
            "agent.entropy_coef is 0 with discrete actions, expected above 0: the policy follows values by it."
        )
    if bool(tasks) != (config.task_dim > 0):
        raise ValueError(
            f"agent.task_dim is {config.task_dim} with {len(tasks)} tasks, expected above 0 with several tasks and 0 "
            "with one."
        )
    if tasks and max(task.action_dim for task in tasks) > action_dim:
        largest = max(tasks, key=lambda task: task.action_dim)
        raise ValueError(f"action_dim is {action_dim}, but task {largest.name!r} has {largest.action_dim}.")
