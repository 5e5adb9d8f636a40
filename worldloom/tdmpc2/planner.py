"""MPPI, model predictive path integral control: TD-MPC2's search (Hansen et al. 2024, section 3.2 and table 9).

E environments are planned in one batched call, each with a warm start of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from worldloom.tdmpc2.world_model import TDMPC2WorldModel


@dataclass(frozen=True)
class PlanNoise:
    """Everything random in one plan. I iterations, H steps, E environments, P policy and S sampled sequences."""

    policy: Tensor  # [H, E, P, A] standard normal, the policy's sequences
    samples: Tensor  # [I, H, E, S, A] standard normal, the sampled sequences
    terminal: Tensor  # [I, E, P + S, A] standard normal, the policy's action at the horizon
    heads: Tensor  # [I, 2] value heads
    choice: Tensor  # [E, elites] standard Gumbel, which elite acts
    explore: Tensor  # [E, A] standard normal, added to the action in training


class Planner:
    """Plans with a world model; holds no state of its own."""

    def __init__(self, model: TDMPC2WorldModel) -> None:
        self.model = model
        c = model.config
        self.iterations = c.iterations + 2 * int(model.action_dim >= 20)

    def draw_noise(self, envs: int, generator: Generator | None = None) -> PlanNoise:
        c, model = self.model.config, self.model
        device, size, sampled = model.bins.device, model.action_dim, c.num_samples - c.num_pi_trajs

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=generator)

        uniform = torch.rand(envs, c.num_elites, device=device, generator=generator)
        return PlanNoise(
            policy=normal(c.horizon, envs, c.num_pi_trajs, size),
            samples=normal(self.iterations, c.horizon, envs, sampled, size),
            terminal=normal(self.iterations, envs, c.num_samples, size),
            heads=torch.stack([model.draw_heads(generator) for _ in range(self.iterations)]),
            choice=-torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7))),
            explore=normal(envs, size),
        )

    def plan(
        self, z: Tensor, previous_mean: Tensor, noise: PlanNoise, explore: bool, task: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Actions [E, A] for latents z [E, D + T], and the mean [E, H, A] to pass in at the next step.

        previous_mean: [E, H, A]; zeros start a row afresh. task: [E], for a multi-task model.
        """
        c, mask = self.model.config, self.model.action_mask(task)
        discount = self._discount(task, len(z))
        policy_actions = self._policy_sequences(z, noise.policy, mask)  # [H, E, P, A]
        mean = torch.cat([previous_mean[:, 1:], torch.zeros_like(previous_mean[:, :1])], 1).movedim(1, 0)
        std = torch.full_like(mean, c.max_std)  # [H, E, A]
        for i in range(self.iterations):
            sampled = (mean.unsqueeze(2) + std.unsqueeze(2) * noise.samples[i]).clamp(-1, 1)
            if mask is not None:
                sampled = sampled * mask[:, None]
            actions = torch.cat([policy_actions, sampled], 2)  # [H, E, P + S, A]
            value = self.sequence_value(z, actions, noise.terminal[i], noise.heads[i], discount, mask).nan_to_num(0.0)
            elite_value, elite = value.topk(c.num_elites, 1)  # [E, elites]
            index = elite[None, :, :, None].expand(c.horizon, -1, -1, actions.shape[-1])
            elite_actions = actions.gather(2, index)
            score, mean, std = update_distribution(elite_value, elite_actions, c.temperature, c.min_std, c.max_std)
            if mask is not None:
                mean, std = mean * mask, std * mask
        chosen = (score.log() + noise.choice).argmax(1)
        action = elite_actions[0, torch.arange(len(z), device=z.device), chosen]
        if explore:
            action = action + std[0] * noise.explore
        return action.clamp(-1, 1), mean.movedim(0, 1)

    def _discount(self, task: Tensor | None, envs: int) -> Tensor:
        """[E]"""
        if task is not None:
            return self.model.discounts[task]
        return torch.full((envs,), self.model.discount, device=self.model.bins.device)

    def sequence_value(
        self,
        z: Tensor,
        actions: Tensor,
        terminal: Tensor,
        heads: Tensor,
        discount: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Predicted rewards, discounted by `discount` [E], plus the value at the horizon: [E, S] for actions
        [H, E, S, A]. mask: [E, A].

        After a predicted end (chance over one half) later rewards and the value no longer count.
        """
        model = self.model
        horizon, envs, samples, size = actions.shape
        latent = z.unsqueeze(1).expand(-1, samples, -1).flatten(0, 1)
        total = torch.zeros(envs * samples, device=z.device)
        alive, rate = torch.ones_like(total), discount.repeat_interleave(samples)
        for t in range(horizon):
            action = actions[t].reshape(-1, size)
            total = total + rate**t * alive * model.predict_reward(latent, action)
            latent = model.next_latent(latent, action)
            if model.termination is not None:
                alive = alive * (model.terminates(latent) <= 0.5)
        repeated = None if mask is None else mask.repeat_interleave(samples, 0)
        last = model.sample_policy(latent, terminal.reshape(-1, size), repeated).action
        value = model.values(latent, last, heads).mean(0)
        return (total + rate**horizon * alive * value).view(envs, samples)

    def _policy_sequences(self, z: Tensor, noise: Tensor, mask: Tensor | None) -> Tensor:
        """The policy's own actions along its own rollout: [H, E, P, A]."""
        latent = z.unsqueeze(1).expand(-1, noise.shape[2], -1)
        actions = []
        for step_noise in noise:
            wide = None if mask is None else mask.unsqueeze(1)
            actions.append(self.model.sample_policy(latent, step_noise, wide).action)
            latent = self.model.next_latent(latent, actions[-1])
        return torch.stack(actions)


def update_distribution(
    value: Tensor, actions: Tensor, temperature: float, min_std: float, max_std: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One MPPI step from the elites: weights [E, K] that sum to one, then mean and std [H, E, A].

    value: [E, K], actions: [H, E, K, A].
    """
    weight = torch.exp(temperature * (value - value.amax(1, keepdim=True)))
    weight = weight / weight.sum(1, keepdim=True)
    share, total = weight[None, :, :, None], weight.sum(1)[None, :, None] + 1e-9
    mean = (share * actions).sum(2) / total
    variance = (share * (actions - mean.unsqueeze(2)).square()).sum(2) / total
    return weight, mean, variance.sqrt().clamp(min_std, max_std)
