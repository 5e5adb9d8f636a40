"""One update of STORM: the world model first, then policy and critic in what it imagines (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from worldloom.actor_critic import RunningRange
from worldloom.capture import Tensors
from worldloom.gang import Gang
from worldloom.generators import restore_generator
from worldloom.imagining import ImaginingUpdate
from worldloom.nets import compile_part
from worldloom.observations import as_mapping
from worldloom.optim import GuardedAdam, load_optimizer, move_towards
from worldloom.storm.behaviour import Behaviour, Imagined, agent_losses, lambda_returns
from worldloom.storm.losses import WorldLosses, WorldNoise, draw_world_noise, world_losses
from worldloom.storm.transformer import Cache, contexts, segments
from worldloom.storm.world_model import STORMWorldModel
from worldloom.types import Batch, Precision

ROWS = ("actions", "rewards", "is_first", "terminated", "life_lost")  # what an update reads of a batch besides obs


@dataclass(frozen=True)
class ImaginationNoise:
    """Holds all random numbers of an imagination from N starts."""

    posterior: Tensor  # [B, T + 1, S, K] standard exponential, for the real rows
    order: Tensor  # [B, T] uniform: the starts are the N / B trained rows of each window with the smallest, before ends
    prior: Tensor  # [H + 1, N, S, K] standard exponential, one window's starts after the other's
    policy: Tensor  # [H, N, A], as the policy draws it

    def chosen(self, ends: Tensor) -> Tensor:
        """Return the starts, N indices into B T trained rows; rows where ends [B, T] is 1 come last."""
        windows, steps = self.order.shape
        places = (self.order + ends).argsort(1)[:, : self.prior.shape[1] // windows]
        return (places + steps * torch.arange(windows, device=places.device).unsqueeze(1)).flatten()


class STORMLearning(ImaginingUpdate):
    """STORM's update: its losses, its two optimisers and the generator of its random numbers."""

    def __init__(self, model: STORMWorldModel, behaviour: Behaviour, seed: int) -> None:
        super().__init__(model, seed)
        self.model, self.behaviour, c = model, behaviour, model.config
        world = [{"params": list(model.parameters())}]
        agent = [{"params": [*behaviour.policy.parameters(), *behaviour.value.parameters()]}]
        self.world_optimizer = GuardedAdam(world, c.world_lr, c.world_eps, c.world_clip)
        self.agent_optimizer = GuardedAdam(agent, c.agent_lr, c.agent_eps, c.agent_clip)
        self.world_losses, self.agent_losses = world_losses, agent_losses  # `configure` may compile them

    def join(self, gang: Gang) -> None:
        """Make updates together with the other learners of a gang from now on.

        The world model's losses are not compiled any more, since their statistics are exchanged on the way.
        """
        self.gang = self.world_optimizer.gang = self.agent_optimizer.gang = gang
        if gang.size > 1:
            self.world_losses = world_losses

    def configure(self, precision: Precision, compiled: bool) -> None:
        """Set the precision of matrix products and, if `compiled`, compile the losses and what is imagined."""
        self._dtype = getattr(torch, precision)
        if compiled:
            for name in ("world_losses", "agent_losses", "_roll_out")[self.gang.size > 1 :]:
                compile_part(self, name)

    def stage(self, batch: Batch) -> Tensors:
        """Return what the update reads of a batch, by name. Raises ValueError for other keys, shapes or lengths."""
        given = {name: torch.as_tensor(value) for name, value in batch.items() if name in ROWS}
        if "continues" in batch:
            given.setdefault("terminated", torch.as_tensor(batch["continues"]) < 1)
        shown = {name: torch.as_tensor(value) for name, value in as_mapping(batch["obs"]).items()}
        self.model.read(cast(Batch, {**given, "obs": shown}))
        return given | {f"obs/{name}": value for name, value in shown.items()}

    def core(self, given: Tensors) -> Tensors:
        """Make the update on the device alone; return no columns for replay. See `worldloom.learner.Update`."""
        obs = {name.removeprefix("obs/"): value for name, value in given.items() if name.startswith("obs/")}
        batch = cast(Batch, {**{name: given[name] for name in ROWS if name in given}, "obs": obs})
        size, steps = batch["actions"].shape[0], batch["actions"].shape[1] - 1
        noise = draw_world_noise(self.model, size, steps, self.generator, self.gang)
        world, norm, made = self.update_world(batch, noise)
        agent, made = self.update_agent(batch, self.draw_noise(size, steps), made)
        self.tally.add({"loss": world.total, **world.parts, "grad_norm": norm, **agent}, made)
        return {}

    def update_world(self, batch: Batch, noise: WorldNoise) -> tuple[WorldLosses, Tensor, Tensor]:
        """Make a step of the world model; return its losses, the norm of its gradient, and whether it was made."""
        with self._autocast():
            found = self.world_losses(self.model, batch, noise, self.gang)
        made, norm = self.world_optimizer.step(found.total)
        self.model.move_statistics(found.seen, made)
        return found, norm, made

    def update_agent(self, batch: Batch, noise: ImaginationNoise, allowed: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Make a step of policy and critic, where `allowed`; return scalars to log, and whether it was made."""
        c, behaviour = self.model.config, self.behaviour
        imagined = self.imagine(batch, noise)
        own, slow = (
            lambda_returns(imagined.rewards, imagined.continues, values, c.lam, c.returns == "published")
            for values in (imagined.values, imagined.slow_values)
        )
        low, high = behaviour.range.after(self.gang.gather(own))
        scale = RunningRange.scale_of(low, high)
        with self._autocast():
            losses, logged = self.agent_losses(
                behaviour, imagined, (own, slow), scale, self.model.bins, c.entropy_scale
            )
        made, norm = self.agent_optimizer.step(losses["policy_loss"] + losses["value_loss"], allowed)
        with torch.no_grad():
            behaviour.range.move(low, high, made)
            move_towards(behaviour.slow_value.parameters(), behaviour.value.parameters(), made * c.slow_rate)
        return {**losses, **logged, "agent_grad_norm": norm}, made

    def draw_noise(self, batch: int, steps: int) -> ImaginationNoise:
        """Draw all random numbers of an imagination from a batch of windows with `steps` trained rows; this learner's
        share of those for the whole batch."""
        model, generator, device, share = self.model, self.generator, self.device, self.gang.share
        length, whole = model.config.imagination_length, batch * self.gang.size
        count = whole * min(-(-model.config.imagination_starts // whole), steps)
        return ImaginationNoise(
            share(model.draw_noise(whole, steps + 1, generator=generator), 0),
            share(torch.rand(whole, steps, generator=generator, device=device), 0),
            share(model.draw_noise(length + 1, count, generator=generator), 1),
            share(self.behaviour.policy.draw_noise((length, count), generator, device), 1),
        )

    @torch.no_grad()
    def imagine(self, batch: Batch, noise: ImaginationNoise) -> Imagined:
        """Imagine H steps with the current policy from N trained rows, each with its own last tokens as context.

        Real rows are encoded anew, with the new parameters and the batch norms' running statistics. Where the policy
        acts on the prior, so does the start: its latent is drawn from it, as published, and its own frame is not read.
        """
        model, behaviour, c = self.model, self.behaviour, self.model.config
        obs, steps = model.read(batch)
        actions, first = steps.actions[:, 1:], steps.is_first[:, 1:]
        with self._autocast():
            _, z = model.see(obs, noise.posterior)
            tokens = model.token(z[:, :-1], actions, first)
            chosen = noise.chosen(steps.terminated[:, 1:])  # nothing follows an end, so nothing was learned of it
            own, padding = contexts(tokens, segments(first)[0], chosen, c.context)
            cache = Cache(model.transformer, own, padding, c.imagination_length)
            start = z[:, 1:].flatten(0, 1)[chosen]
            if c.act_on == "prior":
                start = model.draw(model.log_probs(model.prior(cache.hidden)), noise.prior[0])
            features, drawn, h = self._roll_out(cache, start, noise)
            reward, ends = model.reward(h), model.termination(h).squeeze(-1)
            value, slow_value = behaviour.value(features), behaviour.slow_value(features)
        continues = c.discount * (ends <= 0).float()
        expected = model.expected  # outside of autocast
        return Imagined(features, drawn, expected(reward), continues, expected(value), expected(slow_value))

    def _roll_out(self, cache: Cache, z: Tensor, noise: ImaginationNoise) -> tuple[Tensor, Tensor, Tensor]:
        """Take H steps from latents z [N, S K]; return features [H + 1, N, S K + D], actions [H, N, A] and the h that
        each led to, [H, N, D]."""
        model, policy = self.model, self.behaviour.policy
        features, actions, hidden = [torch.cat([z, cache.hidden], -1)], [], []
        for draw, prior in zip(noise.policy.unbind(), noise.prior[1:].unbind(), strict=True):
            actions.append(policy.sample(features[-1], draw))
            hidden.append(cache.append(model.token(z, actions[-1])))
            z = model.draw(model.log_probs(model.prior(hidden[-1])), prior)
            features.append(torch.cat([z, hidden[-1]], -1))
        return torch.stack(features), torch.stack(actions), torch.stack(hidden)

    def state_dict(self) -> dict[str, Any]:
        return {
            "world_optimizer": self.world_optimizer.adam.state_dict(),
            "agent_optimizer": self.agent_optimizer.adam.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_optimizer(self.world_optimizer.adam, state["world_optimizer"])
        load_optimizer(self.agent_optimizer.adam, state["agent_optimizer"])
        restore_generator(self.generator, state["generator"])
