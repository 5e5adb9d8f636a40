"""TD-MPC2's joint loss of world model and values, and the scale of the policy's values.

Hansen, Su & Wang 2024, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from worldloom import functional as fn
from worldloom.tdmpc2.networks import TDMPC2Networks
from worldloom.tdmpc2.pixels import draw_shifts
from worldloom.types import Batch


@dataclass(frozen=True)
class LossNoise:
    """All random numbers of `joint_loss`, drawn beforehand, so that the loss is a pure function."""

    target_action: Tensor  # [B, H, A] standard normal
    target_heads: Tensor  # [2] distinct head indices
    dropped: Tensor | None  # [B, H, N, M] True where dropout leaves out an entry of the value heads' first layer
    shifts: Tensor | None = None  # [B, H + 1, 2] shifts of images, see `draw_shifts`


@dataclass(frozen=True)
class Losses:
    """Scalars, and the latents [B, H+1, D + T] that the policy is then trained on."""

    loss: Tensor
    consistency_loss: Tensor
    reward_loss: Tensor
    value_loss: Tensor
    termination_loss: Tensor
    latents: Tensor


@dataclass(frozen=True)
class Transitions:
    """Rows as transitions: H actions, rewards and true ends that led to rows 1 to H of the observations."""

    obs: Tensor  # [B, H+1, *obs_shape]
    actions: Tensor  # [B, H, A]
    rewards: Tensor  # [B, H]
    terminated: Tensor  # [B, H]
    task: Tensor | None  # [B] task numbers


def draw_loss_noise(
    networks: TDMPC2Networks, batch_size: int, length: int, generator: Generator | None = None
) -> LossNoise:
    """Draw the noise for a batch of [B, T] rows, T = length."""
    device, steps = networks.bins.device, length - 1
    dropped = networks.draw_dropped((batch_size, steps, networks.config.num_q), generator)
    actions = torch.randn(batch_size, steps, networks.action_dim, device=device, generator=generator)
    shifts = draw_shifts((batch_size, length), device, generator) if networks.pixels else None
    return LossNoise(actions, networks.draw_heads(1, generator)[0], dropped, shifts)


def joint_loss(networks: TDMPC2Networks, batch: Batch, noise: LossNoise) -> Losses:
    """Return the loss of world model and values, and its parts (Hansen et al. 2024, eq. 3).

    loss = mean over t of rho^t (c_c |z' - h(s')|^2 + c_r CE(R, r) + c_v CE(Q, target)) + c_t BCE(termination), where c
    are the config's coefficients and the squared error is a mean over D. Gradients run through the whole latent
    rollout; the policy gets none. Raises ValueError as `transitions`.
    """
    rows = transitions(networks, batch)
    c, steps, task, actions = networks.config, rows.actions.shape[1], rows.task, rows.actions
    with torch.no_grad():
        tasks = None if task is None else task[:, None].expand(rows.obs.shape[0], steps)
        next_z = networks.latent(rows.obs[:, 1:], tasks, None if noise.shifts is None else noise.shifts[:, 1:])
        target = td_target(networks, next_z, rows, noise)
    first_shift = None if noise.shifts is None else noise.shifts[:, 0]
    latents = [networks.latent(rows.obs[:, 0], task, first_shift)]
    for t in range(steps):
        latents.append(networks.next_latent(latents[-1], actions[:, t]))
    z = torch.stack(latents, 1)  # [B, H+1, D + T]
    joint = torch.cat([z[:, :-1], actions], -1)
    weight = c.rho ** torch.arange(steps, device=z.device)

    def over_time(per_step: Tensor) -> Tensor:  # [..., B, H]
        return (per_step.flatten(0, -2).mean(0) * weight).mean()

    consistency = over_time((z[:, 1:] - next_z)[..., : c.latent_dim].square().mean(-1))
    reward = over_time(cross_entropy(networks.reward(joint), rows.rewards, networks.bins))
    logits = networks.q(joint, dropped=noise.dropped, rate=c.dropout)
    value = over_time(cross_entropy(logits, target, networks.bins))
    termination = torch.zeros((), device=z.device)
    if networks.termination is not None:
        logits = networks.termination(z[:, 1:]).squeeze(-1)
        termination = F.binary_cross_entropy_with_logits(logits, rows.terminated)
    total = (
        c.consistency_coef * consistency
        + c.reward_coef * reward
        + c.value_coef * value
        + c.termination_coef * termination
    )
    return Losses(total, consistency, reward, value, termination, z)


def cross_entropy(logits: Tensor, x: Tensor, bins: Tensor) -> Tensor:
    """Return the cross-entropy [...] of logits [..., K] with two-hot symlog(x), x [...] (section 3.1)."""
    return fn.soft_cross_entropy(logits, fn.two_hot(fn.symlog(x), bins))


@torch.no_grad()
def td_target(networks: TDMPC2Networks, next_z: Tensor, rows: Transitions, noise: LossNoise) -> Tensor:
    """Return r + gamma (1 - terminated) min Q(z', a'), [B, H], over two random target heads, with a' ~ policy(z').

    next_z: [B, H, D + T], z' of the observations that the actions led to (Hansen et al. 2024, section 3.1).
    """
    task = None if rows.task is None else rows.task[:, None]
    policy = networks.policy.sample(next_z, noise.target_action, networks.action_mask(task))

    def least(action: Tensor) -> Tensor:
        joint = torch.cat([next_z.expand(*action.shape[:-1], -1), action], -1)
        return fn.symlog_mean(networks.target_q(joint, noise.target_heads), networks.bins).amin(0)

    value = policy.expected(policy.values(least))
    return rows.rewards + networks.discounts(task) * (1 - rows.terminated) * value


def transitions(networks: TDMPC2Networks, batch: Batch) -> Transitions:
    """Check a batch [B, H+1, ...] and return its transitions. Raises ValueError for other shapes or a single row."""
    obs, actions, rewards = batch["obs"], batch["actions"], batch["rewards"]
    if not isinstance(obs, Tensor) or tuple(obs.shape[2:]) != networks.obs_shape:
        found = tuple(obs.shape) if isinstance(obs, Tensor) else f"a mapping of {sorted(obs)}"
        raise ValueError(f"batch['obs'] is {found}, expected [B, T, {', '.join(map(str, networks.obs_shape))}].")
    if obs.shape[1] < 2:
        raise ValueError(f"batch['obs'] has {obs.shape[1]} rows, expected at least 2: one transition.")
    networks.check_action("batch['actions']", actions, tuple(obs.shape[:2]))
    if rewards.shape != obs.shape[:2]:
        raise ValueError(f"batch['rewards'] is {tuple(rewards.shape)}, expected {tuple(obs.shape[:2])}.")
    if "terminated" in batch:
        terminated = batch["terminated"].float()
    elif "continues" in batch:
        terminated = 1 - batch["continues"]
    else:
        terminated = torch.zeros_like(rewards)
    task = batch_task(networks, batch)
    return Transitions(obs, actions[:, 1:].float(), rewards[:, 1:].float(), terminated[:, 1:], task)


def batch_task(networks: TDMPC2Networks, batch: Batch) -> Tensor | None:
    """Return task numbers [B] of batch["task"], [B] or [B, T]; None for a single task. Raises ValueError for others."""
    task = networks.task_numbers(batch.get("task"), len(batch["actions"]))
    if task is not None and networks.tasks:
        task = (task if task.ndim == 1 else task[:, 0]).long()
    networks.check_task("batch['task']", task if networks.tasks else None, len(batch["actions"]))
    return task if networks.tasks else None


def cut_windows(batch: Batch, horizon: int) -> Batch:
    """Cut a batch [B, T, ...] into [B W, horizon + 1, ...], W = (T - 1) // horizon; a short one stays as it is.

    Windows share their end rows; rows that fill no window are left out. A window that crosses into another episode
    keeps its flags.
    """
    rows = batch["actions"].shape[1]
    if rows <= horizon + 1:
        return batch
    index = torch.arange((rows - 1) // horizon)[:, None] * horizon + torch.arange(horizon + 1)  # [W, horizon + 1]

    def cut(value: Tensor) -> Tensor:
        if value.ndim < 2 or value.shape[1] != rows:
            return value.repeat_interleave(len(index), 0)  # one entry per sequence, such as its task
        return value[:, index.to(value.device)].flatten(0, 1)

    return cast(Batch, {name: cut(cast(Tensor, value)) for name, value in batch.items()})


def discounted_mean(loss: Tensor, rho: float) -> Tensor:
    """Return the mean over t of rho^t times the mean over B, a scalar, of a loss [B, T]."""
    weight = rho ** torch.arange(loss.shape[1], device=loss.device)
    return (loss.mean(0) * weight).mean()


class RunningScale:
    """S, which divides values (Hansen et al. 2024, eq. 4): the running distance of their 5th and 95th percentiles.

    It starts at 1, and each step moves a share tau of the way to max(1, P95 - P5).
    """

    def __init__(self, tau: float, device: torch.device | None = None) -> None:
        self.tau = tau
        self.value = torch.ones((), device=device)

    def after(self, x: Tensor) -> Tensor:
        """Return S after the values x, S + tau (max(1, P95 - P5) - S), a scalar; the caller stores it in `value`."""
        low, high = fn.percentile_range(x)
        return self.value.lerp((high - low).clamp(min=1.0), self.tau)
