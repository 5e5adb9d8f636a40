"""MPPI, model predictive path integral control: TD-MPC2's search (Hansen et al. 2024, section 3.2 and table 9).

E environments are planned in one batched call, each with a warm start of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from worldloom.nets import compile_part
from worldloom.tdmpc2.networks import TDMPC2Networks
from worldloom.tdmpc2.policy import choose, likeliest_choice


@dataclass(frozen=True)
class PlanNoise:
    """All random numbers of one plan: I iterations, H steps, E environments, P policy and S sampled sequences."""

    policy: Tensor  # [H, E, P, A] standard normal, the policy's sequences
    samples: Tensor  # [I, H, E, S, A] standard normal, the sampled sequences
    terminal: Tensor  # [I, E, P + S, A] standard normal, the policy's action at the horizon
    heads: Tensor  # [I, 2] value heads
    choice: Tensor  # [E, elites] standard Gumbel, which elite acts
    explore: Tensor  # [E, A] standard normal, added to the action in training


class Planner:
    """Plans with a world model; it holds no state of its own."""

    def __init__(self, model: TDMPC2Networks) -> None:
        self.model = model
        c = model.config
        self.iterations = c.iterations + 2 * int(model.action_dim >= 20)

    def compile(self) -> None:
        """Replace the functions that do the work by their compiled forms."""
        compile_part(self, "iterate")
        compile_part(self, "policy_sequences")

    def draw_noise(self, envs: int, generator: Generator | None = None) -> PlanNoise:
        """Draw all random numbers of one plan for `envs` environments."""
        c, model = self.model.config, self.model
        device, size, sampled = model.bins.device, model.action_dim, c.num_samples - c.num_pi_trajs

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=generator)

        uniform = torch.rand(envs, c.num_elites, device=device, generator=generator)
        return PlanNoise(
            policy=normal(c.horizon, envs, c.num_pi_trajs, size),
            samples=normal(self.iterations, c.horizon, envs, sampled, size),
            terminal=normal(self.iterations, envs, c.num_samples, size),
            heads=model.draw_heads(self.iterations, generator),
            choice=gumbel(uniform),
            explore=normal(envs, size),
        )

    def plan(
        self, z: Tensor, previous: Tensor, noise: PlanNoise, explore: bool, task: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return actions [E, A] for latents z [E, D + T], and the plan [E, H, A] to pass in at the next step.

        previous: the last plan [E, H, A], zeros at the start of an episode. task: [E], for a multi-task model. explore
        adds noise to the actions, as in training.
        """
        mask = self.model.action_mask(task)
        discount = self._discount(task, len(z))
        policy_actions = self.policy_sequences(z, noise.policy, mask)  # [H, E, P, A]
        shifted = torch.cat([previous[:, 1:], torch.zeros_like(previous[:, :1])], 1).movedim(1, 0)
        proposal = self._first_proposal(shifted, mask)
        for i in range(self.iterations):
            draws = (noise.samples[i], noise.terminal[i], noise.heads[i])
            proposal, weight, elite_actions = self.iterate(z, policy_actions, proposal, draws, discount, mask)
        chosen = (weight.log() + noise.choice).argmax(1)
        action = elite_actions[0, torch.arange(len(z), device=z.device), chosen]
        action = proposal.explore(action, noise.explore) if explore else proposal.settle(action)
        return action, proposal.plan

    def iterate(
        self,
        z: Tensor,
        policy_actions: Tensor,
        proposal: Gaussian | Categorical,
        draws: tuple[Tensor, Tensor, Tensor],
        discount: Tensor,
        mask: Tensor | None,
    ) -> tuple[Gaussian | Categorical, Tensor, Tensor]:
        """Make one iteration; return the next proposal, the elites' weights [E, K] and the elites [H, E, K, A].

        policy_actions: [H, E, P, A]; draws: this iteration's samples, terminal, heads of `PlanNoise`; discount: [E].
        """
        c, (samples, terminal, heads) = self.model.config, draws
        actions = torch.cat([policy_actions, proposal.sample(samples)], 2)  # [H, E, P + S, A]
        value = self.sequence_value(z, actions, terminal, heads, discount, mask).nan_to_num(0.0)
        elite_value, elite = value.topk(c.num_elites, 1)  # [E, elites]
        index = elite[None, :, :, None].expand(c.horizon, -1, -1, actions.shape[-1])
        elite_actions = actions.gather(2, index)
        weight = elite_weights(elite_value, c.temperature)
        return proposal.refit(weight, elite_actions), weight, elite_actions

    def _first_proposal(self, shifted: Tensor, mask: Tensor | None) -> Gaussian | Categorical:
        """Return the proposal of the first iteration. shifted: [H, E, A], the previous plan moved on by a step."""
        c, classes = self.model.config, self.model.action_classes
        if classes:
            return Categorical.around(shifted, classes, c.min_probability)
        return Gaussian(shifted, torch.full_like(shifted, c.max_std), mask, c.min_std, c.max_std)

    def _discount(self, task: Tensor | None, envs: int) -> Tensor:
        """Return gamma of each environment, [E]."""
        found = self.model.discounts(task)
        return found if isinstance(found, Tensor) else torch.full((envs,), found, device=self.model.bins.device)

    def sequence_value(
        self,
        z: Tensor,
        actions: Tensor,
        terminal: Tensor,
        heads: Tensor,
        discount: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return sum over t < H of gamma^t r(z_t, a_t), plus gamma^H Q(z_H, policy): [E, S] for actions [H, E, S, A].

        z: [E, D + T]; discount: gamma [E]; mask: [E, A]; Q is the mean of two heads. After a predicted end (chance over
        one half) later rewards and the value no longer count.
        """
        model = self.model
        latents = [z.unsqueeze(1)]  # [E, 1, D + T], one for all samples until they part
        for action in actions:
            latents.append(model.next_latent(latents[-1], action))
        first, *between, latent = latents
        rewards = [model.predict_reward(first, actions[0])]  # [E, S]
        if between:
            rewards += model.predict_reward(torch.stack(between), actions[1:])
        policy = model.policy.sample(latent, terminal, None if mask is None else mask.unsqueeze(1))

        def average(action: Tensor) -> Tensor:
            return model.values(latent.expand(*action.shape[:-1], -1), action, heads).mean(0)

        total, rate = policy.expected(policy.values(average)), discount.unsqueeze(1)
        for reward, arrived in zip(reversed(rewards), reversed(latents), strict=False):
            kept = rate if model.termination is None else rate * (model.terminates(arrived) <= 0.5)
            total = torch.addcmul(reward, kept, total)
        return total

    def policy_sequences(self, z: Tensor, noise: Tensor, mask: Tensor | None) -> Tensor:
        """Draw the policy's own actions along its own rollout, [H, E, P, A]; noise: the same shape, standard normal."""
        latent = z.unsqueeze(1).expand(-1, noise.shape[2], -1)
        actions = []
        for step_noise in noise:
            wide = None if mask is None else mask.unsqueeze(1)
            actions.append(self.model.policy.sample(latent, step_noise, wide).action)
            latent = self.model.next_latent(latent, actions[-1])
        return torch.stack(actions)


def gumbel(uniform: Tensor) -> Tensor:
    """Return standard Gumbel numbers [...] from uniform ones in [0, 1): -ln(-ln(u)), with u kept off both ends."""
    return -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))


def elite_weights(value: Tensor, temperature: float) -> Tensor:
    """Return weights [E, K] that sum to one, proportional to exp(temperature * value), of values [E, K]."""
    return torch.softmax(temperature * value, 1)


@dataclass(frozen=True)
class Gaussian:
    """Independent normals over continuous action sequences: mean and std [H, E, A], mask [E, A] for several tasks."""

    mean: Tensor
    std: Tensor
    mask: Tensor | None
    min_std: float
    max_std: float

    def sample(self, noise: Tensor) -> Tensor:
        """Draw actions [H, E, S, A] in [-1, 1]; noise: [H, E, S, A] standard normal."""
        drawn = (self.mean.unsqueeze(2) + self.std.unsqueeze(2) * noise).clamp(-1, 1)
        return drawn if self.mask is None else drawn * self.mask[:, None]

    def refit(self, weight: Tensor, actions: Tensor) -> Gaussian:
        """Return the normals with the elites' weighted mean and std: weight [E, K], actions [H, E, K, A]."""
        share, total = weight[None, :, :, None], weight.sum(1)[None, :, None] + 1e-9
        mean = (share * actions).sum(2) / total
        variance = (share * (actions - mean.unsqueeze(2)).square()).sum(2) / total
        std = variance.sqrt().clamp(self.min_std, self.max_std)
        if self.mask is not None:
            mean, std = mean * self.mask, std * self.mask
        return Gaussian(mean, std, self.mask, self.min_std, self.max_std)

    def explore(self, action: Tensor, noise: Tensor) -> Tensor:
        """Return action [E, A] plus std times noise [E, A], in [-1, 1]."""
        return (action + self.std[0] * noise).clamp(-1, 1)

    def settle(self, action: Tensor) -> Tensor:
        """Return the action [E, A] of the elite that was drawn, unchanged."""
        return action

    @property
    def plan(self) -> Tensor:
        """The mean [E, H, A], from which the next step starts."""
        return self.mean.movedim(0, 1)


@dataclass(frozen=True)
class Categorical:
    """Independent choices over sequences of one-hot actions: probs [H, E, A], every part of `classes` sums to one.

    An extension of ours: MPPI with elites averaged into probabilities, mixed with a share `least` of uniform ones.
    """

    probs: Tensor
    classes: tuple[int, ...]
    least: float

    @classmethod
    def around(cls, previous: Tensor, classes: tuple[int, ...], least: float) -> Categorical:
        """Return the mean of the previous plan [H, E, A] and uniform choices; the latter alone for zeros (no plan)."""
        parts = []
        for part in previous.split(classes, -1):
            uniform = torch.full_like(part, 1 / part.shape[-1])
            parts.append(torch.where(part.sum(-1, keepdim=True) > 0, (part + uniform) / 2, uniform))
        return cls(torch.cat(parts, -1), classes, least)

    def sample(self, noise: Tensor) -> Tensor:
        """Draw one-hot actions [H, E, S, A]; noise: [H, E, S, A] standard normal."""
        return choose(self.probs.log().unsqueeze(2), noise, self.classes)

    def refit(self, weight: Tensor, actions: Tensor) -> Categorical:
        """Return the choices' weighted shares among the elites: weight [E, K], actions [H, E, K, A]."""
        share = (weight[None, :, :, None] * actions).sum(2)
        parts = [(1 - self.least) * p + self.least / p.shape[-1] for p in share.split(self.classes, -1)]
        return Categorical(torch.cat(parts, -1), self.classes, self.least)

    def explore(self, action: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002 - `Gaussian`'s argument
        """Draw actions [E, A] from the first step's probabilities; noise: [E, A] standard normal."""
        return choose(self.probs[0].log(), noise, self.classes)

    def settle(self, action: Tensor) -> Tensor:  # noqa: ARG002 - a drawn elite may differ where values are close
        """Return the likeliest choice of each part in the first step, [E, A]."""
        return likeliest_choice(self.probs[0], self.classes).to(self.probs.dtype)

    @property
    def plan(self) -> Tensor:
        """The probabilities [E, H, A], from which the next step starts."""
        return self.probs.movedim(0, 1)
