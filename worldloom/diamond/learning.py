"""One update of DIAMOND: denoiser, reward and end, policy and critic, each from its own loss (Alonso et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from worldloom import functional as fn
from worldloom.capture import Tensors
from worldloom.diamond.actor_critic import ActorCritic, Imagined, behaviour_losses
from worldloom.diamond.denoiser import FrameNoise
from worldloom.diamond.optimizer import GuardedAdamW, Part
from worldloom.diamond.reward_end import REWARDS
from worldloom.diamond.rows import Rows, draw_start
from worldloom.diamond.world_model import DiamondWorldModel, Dream, WorldNoise
from worldloom.generators import restore_generator
from worldloom.nets import compile_part
from worldloom.tally import Tally
from worldloom.types import Batch, Precision

ROWS = ("obs", "actions", "rewards", "is_first", "terminated", "truncated", "continues")  # that an update reads
PARTS = ("denoiser", "reward_end", "policy")


@dataclass(frozen=True)
class ImaginationNoise:
    """The random numbers of H imagined steps of B lanes."""

    rows: Tensor  # [B] uniform in [0, 1): at which row of its window a lane starts
    action: Tensor  # [H, B, A] standard exponential
    start: Tensor  # [H, B, C, S, S] standard normal, from which frames are drawn
    churn: Tensor | None  # [H, N, B, C, S, S] standard normal, where the sampler adds noise on the way
    reward: Tensor  # [H, B, 3] standard exponential
    end: Tensor  # [H, B, 2] standard exponential


class DiamondLearning:
    """DIAMOND's update: its losses, its optimiser and the generator of its random numbers."""

    def __init__(self, model: DiamondWorldModel, behaviour: ActorCritic, seed: int) -> None:
        c = model.config
        self.model, self.behaviour, self.tally = model, behaviour, Tally()
        self.generator = torch.Generator(model.device).manual_seed(seed)
        parts = [
            Part(model.denoiser, c.clip_denoiser, c.decay),
            Part(model.reward_end, c.clip_reward, c.decay),
            Part(behaviour, c.clip_policy, 0.0),
        ]
        self.optimizer = GuardedAdamW(parts, c.lr, c.warmup)
        self._dtype = torch.float32

    def configure(self, precision: Precision, compiled: bool) -> None:
        """Set the precision of matrix products and convolutions and, if `compiled`, compile the three networks."""
        self._dtype = getattr(torch, precision)
        if compiled:
            compile_part(self.model.denoiser, "network")
            compile_part(self.model.reward_end, "features")
            compile_part(self.behaviour, "encode")

    def _autocast(self) -> AbstractContextManager[Any]:
        """Return a context for products in the chosen precision. Each phase has its own, since weights that were cast
        without gradient must not serve where a gradient is needed."""
        return nullcontext() if self._dtype == torch.float32 else torch.autocast(self.model.device.type, self._dtype)

    def stage(self, batch: Batch) -> Tensors:
        """Return what the update reads of a batch, by name. Raises ValueError for another number of rows."""
        if isinstance(batch["obs"], Mapping):
            raise ValueError(f"update: obs is a mapping with {sorted(batch['obs'])}, expected one image.")
        given: Tensors = {name: torch.as_tensor(batch[name]) for name in ROWS if name in batch}  # type: ignore[literal-required]
        rows, expected = given["actions"].shape[1], self.model.config.window
        if rows != expected:
            raise ValueError(
                f"update: the batch has {rows} rows, expected {expected}: agent.context and agent.horizon. Make the "
                "replay with windows=agent.windows."
            )
        return given

    def core(self, given: Tensors) -> Tensors:
        """Make the update on the device alone; return no columns for replay. See `worldloom.learner.Update`."""
        rows = self.model.rows(cast(Batch, given))
        noise = self.draw_noise(len(rows.frames))
        loss, scalars = self.loss(rows, *noise)
        made, norms = self.optimizer.step(loss)
        named = {f"{part}_grad_norm": norm for part, norm in zip(PARTS, norms, strict=True)}
        self.tally.add({"loss": loss, **scalars, **named}, made)
        return {}

    def draw_noise(self, batch: int) -> tuple[WorldNoise, ImaginationNoise]:
        """Draw all random numbers of an update of B = batch windows."""
        model, generator = self.model, self.generator
        lead, device = (model.config.horizon, batch), model.device

        def exponential(count: int) -> Tensor:
            return fn.exponential_noise((*lead, count), generator, device)

        world, share = model.draw_noise(batch, generator), torch.rand(batch, generator=generator, device=device)
        action, frames = exponential(model.action_dim), model.denoiser.draw_frame_noise(lead, generator)
        return world, ImaginationNoise(share, action, frames.start, frames.churn, exponential(REWARDS), exponential(2))

    def loss(self, rows: Rows, world: WorldNoise, imagination: ImaginationNoise) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum to minimise and scalars to log. The three parts share no parameters, so that the gradient of
        the sum holds the gradient of each part's own loss."""
        c = self.model.config
        with self._autocast():
            losses = self.model.losses(rows, world)
        with self._autocast():
            imagined = self.imagine(rows, imagination)
        with self._autocast():
            behaviour, logged = behaviour_losses(self.behaviour, imagined, c)
        loss = torch.stack([*losses.values(), behaviour["policy_loss"], c.value_scale * behaviour["value_loss"]]).sum()
        return loss, {**losses, **behaviour, **logged}

    @torch.no_grad()
    def imagine(self, rows: Rows, noise: ImaginationNoise) -> Imagined:
        """Imagine H steps with the current policy from a row of each window, without gradient.

        The LSTMs of rewards and of the policy are burnt in over the n frames before the start.
        """
        model, policy = self.model, self.behaviour
        frames, moves = draw_start(rows, noise.rows, model.config.context)
        dream = Dream(frames, moves, model.reward_end.burn_in(frames, moves))
        memory = policy.initial(len(frames))
        if frames.shape[1] > 1:
            memory = policy.unroll(frames[:, :-1].transpose(0, 1), memory)[1]
        start, seen, told = memory, [frames[:, -1]], []
        churn = noise.churn.unbind() if noise.churn is not None else [None] * len(noise.start)
        for action_noise, first, more, reward_noise, end_noise in zip(
            noise.action, noise.start, churn, noise.reward, noise.end, strict=True
        ):
            memory = policy.lstm(policy.encode(seen[-1]), memory)
            action = fn.draw_one_hot(policy.log_probs(memory[0]).exp(), action_noise)
            chosen = action.argmax(-1)
            frame = model.next_frame(dream, chosen, FrameNoise(first, more))
            outcome, dream = model.outcome(dream, chosen, frame)
            seen.append(frame)
            told.append((action, *outcome.draw(reward_noise, end_noise)))
        actions, rewards, ends = (torch.stack(values) for values in zip(*told, strict=True))
        return Imagined(start, torch.stack(seen), actions, rewards, ends)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        restore_generator(self.generator, state["generator"])
