"""TD-MPC2's networks and the losses that train them (Hansen, Su & Wang 2024, https://arxiv.org/abs/2310.16828)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from worldloom import functional as fn
from worldloom.nets import Ensemble, SimNorm, mlp, mlp_of_pair
from worldloom.optim import move_towards
from worldloom.pretrained import save_model
from worldloom.tdmpc2.config import TDMPC2Config
from worldloom.tdmpc2.pixels import PixelEncoder, draw_shifts
from worldloom.tdmpc2.tasks import Task
from worldloom.types import Batch, LatentState, Obs, ObsShape, Trajectory

BRIGHT = 16.0  # no float image in [0, 1] reaches this, noisy ones included


@dataclass(frozen=True)
class PolicySample:
    """Actions drawn from the policy: all [..., A], but `scaled_entropy` [...]."""

    action: Tensor
    mean_action: Tensor  # tanh of the mean
    log_std: Tensor
    log_prob: Tensor  # [...], after squashing
    scaled_entropy: Tensor  # the bonus in the policy loss


@dataclass(frozen=True)
class LossNoise:
    """Everything random in `losses`, drawn beforehand, so that the losses are a pure function."""

    target_action: Tensor  # [B, H, A] standard normal
    target_heads: Tensor  # [2] distinct head indices
    dropped: Tensor | None  # [B, H, N, M] True where dropout leaves out an entry of the value heads' first layer
    shifts: Tensor | None = None  # [B, H + 1, 2], of images


@dataclass(frozen=True)
class Losses:
    """Scalars, and the latents [B, H+1, D] that the policy is then trained on."""

    loss: Tensor
    consistency_loss: Tensor
    reward_loss: Tensor
    value_loss: Tensor
    termination_loss: Tensor
    latents: Tensor


class TDMPC2WorldModel(nn.Module):
    """Encoder, latent dynamics, reward, policy prior, value ensemble and, if episodic, termination.

    obs_shape: (V,) float32 vectors, or (C, H, W) images, published as 9x64x64: three frames, the oldest first. Actions
    are continuous, in [-1, 1], or one-hot: action_classes then says how many choices each part has (an extension of
    ours). episode_length: agent steps, sets gamma.
    tasks: what a multi-task model knows, in the order of their numbers; what observations of smaller tasks lack of
    obs_shape is filled with zeros, and so are actions beyond a task's own. Raises ValueError for other observations.
    """

    bins: Tensor
    action_masks: Tensor
    discounts: Tensor

    def __init__(
        self,
        obs_shape: ObsShape,
        action_dim: int,
        config: TDMPC2Config | None = None,
        episode_length: int | None = None,
        tasks: Sequence[Task] = (),
        action_classes: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if isinstance(obs_shape, Mapping) or len(obs_shape) not in (1, 3) or min(obs_shape) < 1:
            raise ValueError(
                f"TD-MPC2 reads vectors or images: obs_shape is {obs_shape}, expected (V,) or (C, H, W). Flatten the "
                "observation."
            )
        if len(obs_shape) == 3 and tasks:
            raise ValueError(
                f"obs_shape is {obs_shape} with {len(tasks)} tasks, expected vectors (V,) for several tasks."
            )
        if action_dim < 1:
            raise ValueError(f"action_dim is {action_dim}, expected at least 1.")
        self.config = c = config or TDMPC2Config()
        self.obs_shape, self.action_dim, self.episode_length = tuple(obs_shape), action_dim, episode_length
        self.tasks, self.action_classes = tuple(tasks), tuple(action_classes)
        if self.action_classes and (sum(self.action_classes) != action_dim or self.tasks):
            raise ValueError(
                f"action_classes {self.action_classes} with action_dim {action_dim} and {len(tasks)} tasks, expected "
                "classes that sum to action_dim, and a single task."
            )
        _check_tasks(self.tasks, c.task_dim, action_dim)
        self.discount = c.discount_for(episode_length)
        wide = c.latent_dim + c.task_dim  # a latent and the embedding of its task
        joint, hidden = wide + action_dim, [c.mlp_dim] * 2
        self.encoder: nn.Module
        if self.pixels:
            self.encoder = PixelEncoder(self.obs_shape, c.latent_dim, c.simnorm_dim)
        else:
            encoder_sizes = [obs_shape[0] + c.task_dim] + [c.encoder_dim] * max(c.encoder_layers - 1, 1)
            self.encoder = mlp(encoder_sizes, c.latent_dim, SimNorm(c.simnorm_dim))
        self.dynamics = mlp([joint, *hidden], c.latent_dim, SimNorm(c.simnorm_dim))
        self.reward = mlp([joint, *hidden], c.num_bins)
        self.policy = mlp([wide, *hidden], action_dim if action_classes else 2 * action_dim)
        self.q = Ensemble(c.num_q, joint, c.mlp_dim, c.num_bins)
        self.termination = mlp([wide, *hidden], 1) if c.episodic else None
        self.task_embedding = nn.Embedding(len(tasks), c.task_dim, max_norm=1.0) if tasks else None
        self._initialise()
        self.target_q = Ensemble(c.num_q, joint, c.mlp_dim, c.num_bins).requires_grad_(False)
        self.target_q.load_state_dict(self.q.state_dict())
        self.register_buffer("bins", torch.linspace(-c.bin_limit, c.bin_limit, c.num_bins), persistent=False)
        masks = torch.tensor([[float(i < task.action_dim) for i in range(action_dim)] for task in self.tasks])
        discounts = torch.tensor([c.discount_for(task.episode_length) for task in self.tasks])
        self.register_buffer("action_masks", masks, persistent=False)  # [tasks, A]
        self.register_buffer("discounts", discounts, persistent=False)  # [tasks]

    def _initialise(self) -> None:
        """N(0, 0.02) weights, zero biases; the last layers of reward and values start at exactly zero."""
        for name, parameter in self.named_parameters():
            if ".ln." in name or ".convs." in name:  # convolutions keep torch's own initialisation
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

    # The networks on latents z [..., D + T] and actions [..., A]; one latent [E, 1, D + T] may serve [E, S, A].
    # In a multi-task model a latent carries the embedding of its task in its last T entries, as every network reads it;
    # with a single task T is 0.

    @property
    def pixels(self) -> bool:
        return len(self.obs_shape) == 3

    def latent(self, obs: Tensor, task: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """[..., D + T], of observations [..., *obs_shape] and task numbers [...]; shift: [..., 2] moves images."""
        if self.pixels:
            return cast(Tensor, self.encoder(obs, shift))
        x = fn.symlog(obs.float()) if self.config.symlog_obs else obs.float()
        if self.task_embedding is None:
            return cast(Tensor, self.encoder(x))
        assert task is not None
        embedded = self.embed_task(task)
        return torch.cat([self.encoder(torch.cat([x, embedded], -1)), embedded], -1)

    def embed_task(self, task: Tensor) -> Tensor:
        """[..., T], of task numbers [...]. Embeddings that are looked up and longer than 1 are first cut to that
        length, in place, as `nn.Embedding(max_norm=1)` does, which on a GPU waits for the host."""
        assert self.task_embedding is not None
        weight = self.task_embedding.weight
        with torch.no_grad():
            asked = fn.one_hot(task.flatten(), len(weight)).any(0)
            norm = torch.linalg.vector_norm(weight, dim=1)
            weight.mul_(torch.where(asked & (norm > 1), 1 / (norm + 1e-7), 1.0).unsqueeze(1))
        return F.embedding(task, weight)

    def with_task_embedding(self, z: Tensor, task: Tensor | None) -> Tensor:
        """Latents [B, T, D + T] with their tasks' embeddings looked up again, as the policy's update sees them."""
        if task is None:
            return z
        embedded = self.embed_task(task).detach()[:, None].expand(-1, z.shape[1], -1)
        return torch.cat([z[..., : self.config.latent_dim], embedded], -1)

    def next_latent(self, z: Tensor, action: Tensor) -> Tensor:
        """[..., D + T]"""
        new = mlp_of_pair(self.dynamics, z, action)
        if self.task_embedding is None:
            return new
        return torch.cat([new, z[..., self.config.latent_dim :].expand(*new.shape[:-1], -1)], -1)

    def action_mask(self, task: Tensor | None) -> Tensor | None:
        """[..., A], 1 for the action dimensions that each task [...] uses; None for a single task."""
        return None if task is None else self.action_masks[task]

    def predict_reward(self, z: Tensor, action: Tensor) -> Tensor:
        """[...], of the move out of z."""
        return fn.symlog_mean(mlp_of_pair(self.reward, z, action), self.bins)

    def values(self, z: Tensor, action: Tensor, heads: Tensor | None = None) -> Tensor:
        """[N, ...], of the online heads without dropout; only `heads` [N'] where given."""
        return fn.symlog_mean(self.q(torch.cat([z, action], -1), heads), self.bins)

    def terminates(self, z: Tensor) -> Tensor:
        """[...], chance that the episode truly ends on arriving at z; zeros without a termination head."""
        if self.termination is None:
            return torch.zeros(z.shape[:-1], device=z.device)
        return torch.sigmoid(self.termination(z)).squeeze(-1)

    def sample_policy(self, z: Tensor, noise: Tensor, mask: Tensor | None = None) -> PolicySample:
        """z: [..., D + T], noise: [..., A] standard normal, mask: [..., A] of the tasks."""
        c = self.config
        if self.action_classes:
            return categorical_sample(self.policy(z), noise, self.action_classes)
        mean, raw = self.policy(z).chunk(2, -1)
        log_std = c.log_std_min + 0.5 * (c.log_std_max - c.log_std_min) * (torch.tanh(raw) + 1)
        if mask is not None:
            mean, log_std, noise = mean * mask, log_std * mask, noise * mask
        return squashed_sample(mean, log_std, noise, mask)

    def policy_value(self, policy: PolicySample, value: Callable[[Tensor], Tensor]) -> Tensor:
        """What the policy is worth, [...], with value(actions [..., A]) -> [...].

        The value of the drawn action; discrete policies are weighed exactly: the expected value over the choices of
        each part, the other parts as drawn, averaged over the parts (an extension of ours).
        """
        if not self.action_classes:
            return value(policy.action)
        values = value(alternatives(policy.action, self.action_classes)).movedim(0, -1)  # [..., A]
        return (policy.log_std.exp() * values).sum(-1) / len(self.action_classes)

    # WorldModel

    def encode(self, obs: Obs, task: Tensor | None = None) -> LatentState:
        """obs: [B, V] or [B, C, H, W] (uint8, or floats in [0, 1]); task: [B] numbers, for a multi-task model."""
        shown = self.check_observation("encode", obs, task)
        return LatentState(self.latent(shown, task, self.draw_eval_shifts(len(shown))), task=task)

    def draw_eval_shifts(self, count: int, generator: Generator | None = None) -> Tensor | None:
        """[B, 2] of images that are acted on; None where they stay as they are."""
        if not (self.pixels and self.config.augment_eval):
            return None
        return draw_shifts((count,), self.bins.device, generator)

    def predict(self, state: LatentState, action: Tensor) -> LatentState:
        self._check_action("predict", action, (state.batch_size,))
        return LatentState(self.next_latent(state.deterministic, action), task=state.task)

    def observe(self, state: LatentState, action: Tensor, obs: Obs) -> LatentState:
        """TD-MPC2 keeps no memory: what it observes replaces what it predicted."""
        self._check_action("observe", action, (state.batch_size,))
        return self.encode(obs, state.task)

    def decode(self, state: LatentState) -> dict[str, Any]:
        """`obs` None, `action` [B, A] (the policy's mean), `reward` [B, 1] and `q_values` [B, N] of that action,
        `continue` [B, 1]."""
        z = state.deterministic
        zeros = torch.zeros(len(z), self.action_dim, device=z.device)
        action = self.sample_policy(z, zeros, self.action_mask(state.task)).mean_action
        return {
            "obs": None,
            "reward": self.predict_reward(z, action).unsqueeze(-1),
            "continue": (1 - self.terminates(z)).unsqueeze(-1),
            "q_values": self.values(z, action).movedim(0, -1),
            "action": action,
        }

    def imagine(self, state: LatentState, actions: Tensor) -> Trajectory:
        self._check_action("imagine", actions, (actions.shape[0], state.batch_size))
        states, rewards, continues = [state], [], []
        for action in actions:
            z = states[-1].deterministic
            rewards.append(self.predict_reward(z, action))
            states.append(LatentState(self.next_latent(z, action), task=state.task))
            continues.append(1 - self.terminates(states[-1].deterministic))
        return Trajectory(tuple(states), torch.stack(rewards).unsqueeze(-1), torch.stack(continues).unsqueeze(-1))

    def initial_state(self, batch_size: int) -> LatentState:
        """Uniform simplices: what SimNorm makes of zeros. Raises ValueError for a multi-task model (use `encode`)."""
        if self.tasks:
            raise ValueError("initial_state: this model knows several tasks. Use encode(obs, task).")
        z = torch.full((batch_size, self.config.latent_dim), 1 / self.config.simnorm_dim)
        return LatentState(z.to(self.bins.device))

    def compute_loss(self, batch: Batch) -> dict[str, Tensor]:
        """`loss` and its parts `consistency_loss`, `reward_loss`, `value_loss`, `termination_loss`.

        batch: T >= 2 rows of one episode each; more than horizon + 1 are cut into windows of that many, which share
        their end rows. The policy has a loss of its own (`TDMPC2Agent.update`); after a step of an optimiser on this
        one, call `update_targets`.
        """
        batch = cut_windows(batch, self.config.horizon)
        found = self.losses(batch, self.draw_noise(*batch["actions"].shape[:2]))
        names = [field.name for field in dataclasses.fields(found) if field.name != "latents"]
        return {name: getattr(found, name) for name in names}

    def with_task(self, task: Task, like: str) -> TDMPC2WorldModel:
        """A copy of this multi-task model that knows one task more, with the embedding of the task named `like`.

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

    # Learning

    def update_targets(self, made: Tensor | None = None) -> None:
        """Move the target value heads towards the online ones, by config.tau; made: bool scalar, False leaves them."""
        rate = torch.full((), self.config.tau, device=self.bins.device)
        rate = rate if made is None else rate * made
        move_towards(self.target_q.parameters(), self.q.parameters(), rate)

    def draw_noise(self, batch_size: int, length: int, generator: Generator | None = None) -> LossNoise:
        """For `losses` of [B, T] rows."""
        device, steps = self.bins.device, length - 1
        dropped = self.draw_dropped((batch_size, steps, self.config.num_q), generator)
        actions = torch.randn(batch_size, steps, self.action_dim, device=device, generator=generator)
        shifts = draw_shifts((batch_size, length), device, generator) if self.pixels else None
        return LossNoise(actions, self.draw_heads(generator), dropped, shifts)

    def draw_dropped(self, lead: tuple[int, ...], generator: Generator | None = None) -> Tensor | None:
        """[*lead, M], of the value heads' first layer; None without dropout."""
        c = self.config
        return fn.random_mask((*lead, c.mlp_dim), c.dropout, generator, self.bins.device) if c.dropout > 0 else None

    def draw_heads(self, generator: Generator | None = None) -> Tensor:
        """[2] distinct head indices."""
        return self.draw_heads_for(1, generator)[0]

    def draw_heads_for(self, count: int, generator: Generator | None = None) -> Tensor:
        """[count, 2]: two distinct head indices for each of `count` uses."""
        return torch.rand(count, self.config.num_q, device=self.bins.device, generator=generator).argsort(1)[:, :2]

    def losses(self, batch: Batch, noise: LossNoise) -> Losses:
        """The joint loss of section 3.1: sum over t of rho^t (consistency + reward + value), plus termination.

        Gradients run through the whole latent rollout; the policy gets none.
        """
        obs, actions, rewards, terminated = self._transitions(batch)
        c, steps, task = self.config, actions.shape[1], self.batch_task(batch)
        with torch.no_grad():
            tasks = None if task is None else task[:, None].expand(obs.shape[0], steps)
            next_z = self.latent(obs[:, 1:], tasks, None if noise.shifts is None else noise.shifts[:, 1:])
            target = self.td_target(next_z, rewards, terminated, noise, task)
        latents = [self.latent(obs[:, 0], task, None if noise.shifts is None else noise.shifts[:, 0])]
        for t in range(steps):
            latents.append(self.next_latent(latents[-1], actions[:, t]))
        z = torch.stack(latents, 1)  # [B, H+1, D + T]
        joint = torch.cat([z[:, :-1], actions], -1)
        weight = c.rho ** torch.arange(steps, device=z.device)

        def over_time(per_step: Tensor) -> Tensor:  # [..., B, H]
            return (per_step.flatten(0, -2).mean(0) * weight).mean()

        consistency = over_time((z[:, 1:] - next_z)[..., : c.latent_dim].square().mean(-1))
        reward = over_time(self._cross_entropy(self.reward(joint), rewards))
        value = over_time(self._cross_entropy(self.q(joint, dropped=noise.dropped, rate=c.dropout), target))
        termination = torch.zeros((), device=z.device)
        if self.termination is not None:
            logits = self.termination(z[:, 1:]).squeeze(-1)
            termination = F.binary_cross_entropy_with_logits(logits, terminated)
        total = (
            c.consistency_coef * consistency
            + c.reward_coef * reward
            + c.value_coef * value
            + c.termination_coef * termination
        )
        return Losses(total, consistency, reward, value, termination, z)

    @torch.no_grad()
    def td_target(
        self, next_z: Tensor, rewards: Tensor, terminated: Tensor, noise: LossNoise, task: Tensor | None = None
    ) -> Tensor:
        """r + gamma (1 - terminated) min over two random target heads of Q(z', a' ~ policy): [B, H]."""
        mask = self.action_mask(None if task is None else task[:, None])
        policy = self.sample_policy(next_z, noise.target_action, mask)

        def least(action: Tensor) -> Tensor:
            joint = torch.cat([next_z.expand(*action.shape[:-1], -1), action], -1)
            return fn.symlog_mean(self.target_q(joint, noise.target_heads), self.bins).amin(0)

        value = self.policy_value(policy, least)
        discount = self.discount if task is None else self.discounts[task][:, None]
        return rewards + discount * (1 - terminated) * value

    def _cross_entropy(self, logits: Tensor, x: Tensor) -> Tensor:
        return fn.soft_cross_entropy(logits, fn.two_hot(fn.symlog(x), self.bins))

    def _transitions(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows to transitions: obs [B, H+1, V], and the H actions, rewards and ends that led to rows 1..H."""
        obs, actions, rewards = batch["obs"], batch["actions"], batch["rewards"]
        if not isinstance(obs, Tensor) or tuple(obs.shape[2:]) != self.obs_shape:
            found = tuple(obs.shape) if isinstance(obs, Tensor) else f"a mapping of {sorted(obs)}"
            raise ValueError(f"batch['obs'] is {found}, expected [B, T, {', '.join(map(str, self.obs_shape))}].")
        if obs.shape[1] < 2:
            raise ValueError(f"batch['obs'] has {obs.shape[1]} rows, expected at least 2: one transition.")
        self._check_action("batch['actions']", actions, tuple(obs.shape[:2]))
        if rewards.shape != obs.shape[:2]:
            raise ValueError(f"batch['rewards'] is {tuple(rewards.shape)}, expected {tuple(obs.shape[:2])}.")
        if "terminated" in batch:
            terminated = batch["terminated"].float()
        elif "continues" in batch:
            terminated = 1 - batch["continues"]
        else:
            terminated = torch.zeros_like(rewards)
        return obs, actions[:, 1:].float(), rewards[:, 1:].float(), terminated[:, 1:]

    def check_observation(self, where: str, obs: Obs, task: Tensor | None) -> Tensor:
        """obs [B, *obs_shape], padded with zeros where a model of several tasks is given fewer numbers.

        Raises ValueError for another shape, and where task [B] does not fit.
        """
        if self.tasks and isinstance(obs, Tensor) and obs.ndim == 2 and obs.shape[1] < self.obs_shape[0]:
            obs = F.pad(obs, (0, self.obs_shape[0] - obs.shape[1]))
        if not isinstance(obs, Tensor) or tuple(obs.shape[1:]) != self.obs_shape:
            found = tuple(obs.shape) if isinstance(obs, Tensor) else f"a mapping of {sorted(obs)}"
            raise ValueError(f"{where}: obs is {found}, expected [B, {', '.join(map(str, self.obs_shape))}].")
        if self.pixels and obs.is_floating_point() and obs.numel() and obs.max() > BRIGHT:
            raise ValueError(f"{where}: images are floats up to {obs.max():.0f}, expected uint8, or floats in [0, 1].")
        self._check_task(where, task, len(obs))
        return obs

    def batch_task(self, batch: Batch) -> Tensor | None:
        """[B] task numbers out of batch["task"], [B] or [B, T]; None for a single task."""
        task = batch.get("task")
        if task is not None and self.tasks:
            task = (task if task.ndim == 1 else task[:, 0]).long()
        self._check_task("batch['task']", task if self.tasks else None, len(batch["actions"]))
        return task if self.tasks else None

    def _check_task(self, where: str, task: Tensor | None, count: int) -> None:
        if self.tasks and task is None:
            raise ValueError(f"{where}: this model knows {len(self.tasks)} tasks, expected their numbers, task [B].")
        if task is not None and not self.tasks:
            raise ValueError(f"{where}: task was given, but this model knows a single task.")
        if task is not None and tuple(task.shape) != (count,):
            raise ValueError(f"{where}: task is {tuple(task.shape)}, expected ({count},).")

    def _check_action(self, where: str, action: Tensor, lead: tuple[int, ...]) -> None:
        expected = (*lead, self.action_dim)
        if tuple(action.shape) != expected:
            raise ValueError(f"{where}: actions are {tuple(action.shape)}, expected {expected}.")


def cut_windows(batch: Batch, horizon: int) -> Batch:
    """[B, T, ...] as [B W, horizon + 1, ...]: W = (T - 1) // horizon windows, as they are where T <= horizon + 1.

    Rows that fill no window are left out. A window whose steps cross into another episode keeps its flags.
    """
    rows = batch["actions"].shape[1]
    if rows <= horizon + 1:
        return batch
    index = torch.arange((rows - 1) // horizon)[:, None] * horizon + torch.arange(horizon + 1)  # [W, horizon + 1]

    def cut(value: Tensor) -> Tensor:
        if value.ndim < 2 or value.shape[1] != rows:
            return value.repeat_interleave(len(index), 0)  # one entry for a sequence, such as its task
        return value[:, index.to(value.device)].flatten(0, 1)

    return cast(Batch, {name: cut(cast(Tensor, value)) for name, value in batch.items()})


def choose(log_probs: Tensor, noise: Tensor, classes: Sequence[int]) -> Tensor:
    """One-hot draws [..., A], part by part; noise: [..., A] standard normal, made Gumbel by its quantiles."""
    uniform = torch.special.ndtr(noise).clamp(1e-7, 1 - 1e-7)
    perturbed = log_probs - torch.log(-torch.log(uniform))
    parts = [fn.one_hot(part.argmax(-1), part.shape[-1]) for part in perturbed.split(tuple(classes), -1)]
    return torch.cat(parts, -1).to(noise.dtype)


def categorical_sample(logits: Tensor, noise: Tensor, classes: Sequence[int]) -> PolicySample:
    """Independent choices (an extension of ours; no counterpart in the paper).

    The entropy is exact, not that of the draw; `log_std` holds the log-probabilities.
    """
    log_probs = torch.cat([F.log_softmax(part, -1) for part in logits.split(tuple(classes), -1)], -1)
    probs, drawn = log_probs.exp(), choose(log_probs, noise, classes)
    likeliest = [fn.one_hot(part.argmax(-1), part.shape[-1]) for part in log_probs.split(tuple(classes), -1)]
    entropy = -(probs * log_probs).sum(-1)
    mean_action = torch.cat(likeliest, -1).to(logits.dtype)
    return PolicySample(drawn, mean_action, log_probs, (drawn * log_probs).sum(-1), entropy)


def alternatives(action: Tensor, classes: Sequence[int]) -> Tensor:
    """[A, ..., A]: for every choice of every part of one-hot actions [..., A], the action with that choice instead."""
    made, begin = [], 0
    for count in classes:
        for choice in torch.eye(count, device=action.device, dtype=action.dtype):
            before, part, after = action.split([begin, count, action.shape[-1] - begin - count], -1)
            made.append(torch.cat([before, choice.expand_as(part), after], -1))
        begin += count
    return torch.stack(made)


def _check_tasks(tasks: Sequence[Task], task_dim: int, action_dim: int) -> None:
    if bool(tasks) != (task_dim > 0):
        raise ValueError(
            f"agent.task_dim is {task_dim} with {len(tasks)} tasks, expected above 0 with several tasks and 0 with one."
        )
    if tasks and max(task.action_dim for task in tasks) > action_dim:
        largest = max(tasks, key=lambda task: task.action_dim)
        raise ValueError(f"action_dim is {action_dim}, but task {largest.name!r} has {largest.action_dim}.")


def squashed_sample(mean: Tensor, log_std: Tensor, noise: Tensor, mask: Tensor | None = None) -> PolicySample:
    """a = tanh(mean + noise exp(log_std)), with its log-probability.

    The scaled entropy is the reference's: -log_prob * A g / log_prob, that is -A g with g the log-density before
    squashing (its issue #76). mask: [..., A]; A then counts the dimensions that a task uses.
    """
    action = torch.tanh(mean + noise * log_std.exp())
    gaussian = (-0.5 * noise.square() - log_std - 0.9189385175704956).sum(-1)
    log_prob = gaussian - torch.log(F.relu(1 - action.square()) + 1e-6).sum(-1)
    size = mean.shape[-1] if mask is None else mask.sum(-1)
    scale = size * gaussian / (log_prob + 1e-8)
    return PolicySample(action, torch.tanh(mean), log_std, log_prob, -log_prob * scale)
