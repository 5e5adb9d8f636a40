"""One update of DIAMOND: denoiser, reward and end, policy and critic, each from its own loss (Alonso et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from worldloom import functional as fn
from worldloom.adamw import GuardedAdamW, Part
from worldloom.capture import Tensors
from worldloom.diamond.actor_critic import ActorCritic, Imagined, behaviour_losses
from worldloom.diamond.denoiser import DenoisingNoise
from worldloom.diamond.reward_end import ENDS, REWARDS
from worldloom.diamond.rows import Rows
from worldloom.diamond.world_model import DiamondWorldModel, Dream
from worldloom.gang import Gang
from worldloom.generators import restore_generator
from worldloom.imagining import ImaginingUpdate
from worldloom.nets import compile_part
from worldloom.types import Batch, Precision

ROWS = ("obs", "actions", "rewards", "is_first", "terminated", "truncated", "continues")  # that an update reads


@dataclass(frozen=True)
class ImaginationNoise:
    """The random numbers of H imagined steps of B lanes."""

    rows: Tensor  # [B] uniform in [0, 1): at which row of its window a lane starts
    frame: Tensor  # [H, 1 or N + 1, B, C, S, S] standard normal, of `Denoiser.sample`
    action: Tensor  # [H, B, A] standard exponential
    reward: Tensor  # [H, B, 3] standard exponential
    end: Tensor  # [H, B, 2] standard exponential


class DiamondLearning(ImaginingUpdate):
    """DIAMOND's update: its losses, its optimiser and the generator of its random numbers."""

    def __init__(self, model: DiamondWorldModel, behaviour: ActorCritic, seed: int) -> None:
        super().__init__(model, seed)
        self.model, self.behaviour, c = model, behaviour, model.config
        parts = [
            Part(model.denoiser, c.clip_denoiser, c.decay),
            Part(model.reward_end, c.clip_reward, c.decay),
            Part(behaviour, c.clip_policy, 0.0),
        ]
        self.optimizer = GuardedAdamW(parts, c.lr, c.warmup)

    def join(self, gang: Gang) -> None:
        """Make updates together with the other learners of a gang from now on."""
        self.gang = self.optimizer.gang = gang

    def configure(self, precision: Precision, compiled: bool) -> None:
        """Set the precision of matrix products and convolutions and, if `compiled`, compile the three networks."""
        self._dtype = getattr(torch, precision)
        if compiled:
            compile_part(self.model.denoiser, "raw")
            compile_part(self.model.reward_end, "features")
            compile_part(self.behaviour, "encode")

    def stage(self, batch: Batch) -> Tensors:
        """Return what the update reads of a batch, by name. Raises ValueError for another number of rows or shape."""
        given: Tensors = {name: torch.as_tensor(batch[name]) for name in ROWS if name in batch}  # type: ignore[literal-required]
        rows, expected = self.model.check_image("update", batch["obs"], 2).shape[1], self.model.config.window
        if rows != expected:
            found = f"the batch has {rows} rows, expected {expected}: agent.context and agent.horizon"
            raise ValueError(f"update: {found}. Make the replay with windows=agent.windows.")
        return given

    def core(self, given: Tensors) -> Tensors:
        """Make the update on the device alone; return no columns for replay. See `worldloom.learner.Update`."""
        rows = self.model.rows(cast(Batch, given))
        loss, scalars = self.loss(rows, *self.draw_noise(len(rows.frames)))
        made, norms = self.optimizer.step(loss)
        named = {f"{part}_grad_norm": norm for part, norm in zip(("denoiser", "reward", "policy"), norms, strict=True)}
        self.tally.add({"loss": loss, **scalars, **named}, made)
        return {}

    def draw_noise(self, batch: int) -> tuple[DenoisingNoise, ImaginationNoise]:
        """Draw the random numbers of an update of B = batch windows: this learner's share of the whole batch's."""
        model, generator, horizon = self.model, self.generator, self.model.config.horizon
        share, whole = self.gang.share, batch * self.gang.size
        denoising = model.denoiser.draw_noise(whole, generator)
        wide = (share(x, 1) for x in (denoising.level, denoising.offset, denoising.pixels))
        rows = torch.rand(whole, generator=generator, device=model.device)
        frame = model.denoiser.draw_frame_noise((horizon,), whole, generator)
        shapes = [(horizon, whole, count) for count in (model.action_dim, REWARDS, ENDS)]
        drawn = (share(fn.exponential_noise(shape, generator, model.device), 1) for shape in shapes)
        imagination = ImaginationNoise(share(rows, 0), share(frame, 2), *drawn)
        return DenoisingNoise(share(denoising.rows, 0), *wide), imagination

    def loss(self, rows: Rows, denoising: DenoisingNoise, imagination: ImaginationNoise) -> tuple[Tensor, Tensors]:
        """Return the sum to minimise and scalars to log. The three parts share no parameters, so that the gradient of
        the sum holds the gradient of each part's own loss."""
        c = self.model.config
        with self._autocast():
            losses = self.model.losses(rows, denoising, self.gang)
        with self._autocast():
            imagined = self.imagine(rows, imagination)
        with self._autocast():
            behaviour, logged = behaviour_losses(self.behaviour, imagined, c, self.gang)
        loss = torch.stack([*losses.values(), behaviour["policy_loss"], c.value_scale * behaviour["value_loss"]]).sum()
        return loss, {**losses, **behaviour, **logged}

    @torch.no_grad()
    def imagine(self, rows: Rows, noise: ImaginationNoise) -> Imagined:
        """Imagine H steps with the current policy from a row of each window, without gradient.

        The LSTMs of rewards and of the policy first see the n frames that lead to the start.
        """
        model, policy = self.model, self.behaviour
        frames, moves = rows.draw_start(noise.rows, model.config.context)
        dream = Dream(frames, moves, model.reward_end.unroll(frames, moves)[1])
        start = memory = policy.unroll(frames[:, :-1].transpose(0, 1), policy.lstm.initial(len(frames)))[1]
        told = []
        for draws, *drawn in zip(noise.frame, noise.action, noise.reward, noise.end, strict=True):
            frame = dream.frames[:, -1]
            memory = policy.lstm(policy.encode(frame), memory)
            action = fn.draw_one_hot(policy.log_probs(memory[0]).exp(), drawn[0])
            chosen = action.argmax(-1)
            dream = model.moved(dream, chosen, model.next_frame(dream, chosen, draws))
            outcome = model.reward_end.outcome(dream.memory[0])
            told.append((frame, action, *outcome.draw(*drawn[1:])))
        seen, actions, rewards, ends = (torch.stack(values) for values in zip(*told, strict=True))
        return Imagined(start, torch.cat([seen, dream.frames[None, :, -1]]), actions, rewards, ends)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        restore_generator(self.generator, state["generator"])
