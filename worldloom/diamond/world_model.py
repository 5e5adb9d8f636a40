"""DIAMOND's world model: a denoiser draws frames, and a recurrent model tells their rewards and ends."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from worldloom.arguments import check_batch
from worldloom.diamond.config import DiamondConfig
from worldloom.diamond.denoiser import Denoiser, DenoisingNoise
from worldloom.diamond.reward_end import Memory, RewardEnd
from worldloom.diamond.rows import Rows, as_frames
from worldloom.gang import ALONE, Gang
from worldloom.pretrained import save_model
from worldloom.types import Batch, LatentState, ObsShape, Trajectory, is_image

FLAGS = ("is_first", "terminated", "truncated")


@dataclass(frozen=True)
class Dream:
    """A state of B environments, as the model's own parts read it."""

    frames: Tensor  # [B, n, C, S, S], the present frame last
    actions: Tensor  # [B, n - 1] class indices, the moves between these frames
    memory: Memory  # of the LSTM of rewards and ends, [B, D] each

    def moves(self, action: Tensor) -> Tensor:
        """Return the moves out of the frames [B, n], of which action [B] is the last."""
        return torch.cat([self.actions, action.unsqueeze(1)], 1)

    def as_latent(self, moved: bool = True) -> LatentState:
        """Return the state; moved: whether a move led to it, so that rewards and ends are known."""
        (hidden, cell), seen = self.memory, torch.full((len(self.frames),), moved, device=self.frames.device)
        return LatentState(hidden, memory={"frames": self.frames, "actions": self.actions, "cell": cell, "moved": seen})


class DiamondWorldModel(nn.Module):
    """DIAMOND's world model, of one square image [C, S, S] and one choice out of A = action_dim actions.

    The state of an environment: `deterministic` is the hidden state of the LSTM of rewards and ends, which its head
    reads; `memory` holds the last n frames, the n - 1 actions between them and the LSTM's cell state. `predict` draws a
    frame from torch's own generator. Raises ValueError for other observations and sides that cannot be halved.
    """

    predicts_signs = True  # of rewards

    def __init__(
        self,
        obs_shape: ObsShape,
        action_dim: int,
        config: DiamondConfig | None = None,
        episode_length: int | None = None,
    ) -> None:
        super().__init__()
        self.config = c = config or DiamondConfig()
        if action_dim < 1:
            raise ValueError(f"action_dim is {action_dim}, expected at least 1.")
        if isinstance(obs_shape, Mapping) or not is_image(tuple(obs_shape)) or obs_shape[1] != obs_shape[2]:
            raise ValueError(f"obs_shape is {obs_shape}, but DIAMOND reads one square image, (C, S, S).")
        self.obs_shape, step = tuple(obs_shape), 2 ** max(c.reward_levels - 1, c.policy_levels)
        if obs_shape[1] % step:
            raise ValueError(
                f"obs_shape is {self.obs_shape}, but DIAMOND's encoders halve the sides to 1/{step}. Set "
                f"env.image_size to a multiple of {step}, or choose fewer agent.policy_levels and agent.reward_levels."
            )
        self.action_dim, self.episode_length = action_dim, episode_length
        self.denoiser = Denoiser(self.obs_shape, action_dim, c)
        self.reward_end = RewardEnd(self.obs_shape, action_dim, c)

    @property
    def device(self) -> torch.device:
        return self.denoiser.noise_emb.device

    def initial_state(self, batch_size: int) -> LatentState:
        return self._grey(batch_size).as_latent(moved=False)

    def encode(self, obs: Any) -> LatentState:
        """Return the state after seeing only obs [B, C, S, S], uint8 or floats in [0, 1], after grey frames."""
        frame = self.check_image("encode", obs, 1)
        grey = self._grey(len(frame))
        frames = torch.cat([grey.frames[:, 1:], as_frames(frame).unsqueeze(1)], 1)
        return Dream(frames, grey.actions, self.reward_end.unroll(frames, grey.actions)[1]).as_latent(moved=False)

    def predict(self, state: LatentState, action: Tensor) -> LatentState:
        chosen, dream = self._chosen("predict", action, (state.batch_size,)), as_dream(state)
        frame = self.next_frame(dream, chosen, self.denoiser.draw_frame_noise((), state.batch_size, None))
        return self.moved(dream, chosen, frame).as_latent()

    def observe(self, state: LatentState, action: Tensor, obs: Any) -> LatentState:
        chosen, frame = self._chosen("observe", action, (state.batch_size,)), self.check_image("observe", obs, 1)
        if len(frame) != state.batch_size:
            raise ValueError(f"observe: {len(frame)} observations, expected {state.batch_size}: one for each state.")
        return self.moved(as_dream(state), chosen, as_frames(frame)).as_latent()

    def decode(self, state: LatentState) -> dict[str, Any]:
        """Return `obs` [B, C, S, S] in [0, 1], and of the move that led here `reward` [B, 1], the expected sign of the
        reward in [-1, 1], and `continue` [B, 1]: 0 and 1 for `encode` and `initial_state`, to which no move led."""
        images, moved = (as_dream(state).frames[:, -1] + 1) / 2, state.memory["moved"].unsqueeze(1)
        reward, goes_on = (each.unsqueeze(1) for each in self.reward_end.outcome(state.deterministic).expected())
        return {"obs": images, "reward": reward * moved, "continue": goes_on.where(moved, 1.0)}

    def imagine(self, state: LatentState, actions: Tensor) -> Trajectory:
        """Roll the model forward under actions [T, B, A]; rewards are expected signs of rewards, in [-1, 1]."""
        states = [state]
        for action in actions:
            states.append(self.predict(states[-1], action))
        reward, goes_on = self.reward_end.outcome(torch.stack([s.deterministic for s in states[1:]])).expected()
        return Trajectory(tuple(states), reward.unsqueeze(-1), goes_on.unsqueeze(-1))

    def compute_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return `loss`, the sum of `denoising_loss`, `reward_loss` and `end_loss`; scalars. Raises ValueError for a
        batch with fewer rows than the denoiser takes, n + 1 + autoregressive."""
        check_batch(batch)
        rows = self.rows(batch)
        if (count := rows.frames.shape[1]) < (least := self.config.denoised_rows):
            raise ValueError(f"the batch has {count} rows, expected at least {least}: context and denoised frames.")
        losses = self.losses(rows, self.denoiser.draw_noise(len(rows.frames), None))
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def update_targets(self) -> None:
        """Do nothing: this model learns from no slow copies."""

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        save_model(directory, self.describe(), self)

    def describe(self) -> dict[str, Any]:
        sizes = {"family": "diamond", "obs_shape": list(self.obs_shape), "action_dim": self.action_dim}
        return {**sizes, "episode_length": self.episode_length, "config": dataclasses.asdict(self.config)}

    def losses(self, rows: Rows, noise: DenoisingNoise, gang: Gang = ALONE) -> dict[str, Tensor]:
        """Return the losses of both parts, scalars: the denoiser takes some rows of each window, the other all.
        gang: as `Outcome.losses` takes it."""
        denoised = rows.draw_stretch(noise.rows, self.config.denoised_rows)
        first = rows.is_first[:, 1:]
        outcome = self.reward_end.outcome(self.reward_end.unroll(rows.frames, rows.actions[:, 1:], first)[0])
        reward_loss, end_loss = outcome.losses(rows.rewards[:, 1:], rows.terminated[:, 1:], ~first, gang)
        denoising_loss = self.denoiser.loss(*denoised, noise)
        return {"denoising_loss": denoising_loss, "reward_loss": reward_loss, "end_loss": end_loss}

    def next_frame(self, dream: Dream, action: Tensor, noise: Tensor) -> Tensor:
        """Draw the frame [B, C, S, S] that action [B] leads to; noise: of `Denoiser.draw_frame_noise`."""
        return self.denoiser.sample(dream.frames, dream.moves(action), noise)[-1]

    def moved(self, dream: Dream, action: Tensor, frame: Tensor) -> Dream:
        """Return the state after action [B] led to frame [B, C, S, S]."""
        features = self.reward_end.features(dream.frames[:, -1], action, frame)
        memory = self.reward_end.lstm(features.flatten(1), dream.memory)
        return Dream(torch.cat([dream.frames[:, 1:], frame.unsqueeze(1)], 1), dream.moves(action)[:, 1:], memory)

    def rows(self, batch: Batch) -> Rows:
        """Return a batch as this model's rows; flags that are missing are False. Raises ValueError for bad shapes."""
        images = self.check_image("batch['obs']", batch["obs"], 2)
        lead = tuple(images.shape[:2])
        actions, rewards = self._chosen("batch['actions']", batch["actions"], lead), batch["rewards"].float()
        ends = {"terminated": 1 - batch["continues"]} if "continues" in batch else {}
        given: dict[str, Any] = {**dict.fromkeys(FLAGS, torch.zeros_like(rewards)), **ends, **batch}
        flags = {name: given[name].bool() for name in FLAGS}
        for name, value in {"rewards": rewards, **flags}.items():
            if tuple(value.shape) != lead:
                raise ValueError(f"batch[{name!r}] is {tuple(value.shape)}, expected {lead}.")
        return Rows(as_frames(images), actions * ~flags["is_first"], rewards, **flags)

    def check_image(self, where: str, obs: Any, lead: int) -> Tensor:
        """Return obs, images with `lead` dimensions before [C, S, S]. Raises ValueError for anything else."""
        if isinstance(obs, Mapping):
            raise ValueError(f"{where}: obs is a mapping with {sorted(obs)}, expected one image.")
        image = torch.as_tensor(obs)
        if tuple(image.shape[lead:]) != self.obs_shape:
            raise ValueError(f"{where}: obs is {tuple(image.shape)}, expected {('B', 'T')[:lead] + self.obs_shape}.")
        return image

    def _chosen(self, where: str, actions: Tensor, lead: tuple[int, ...]) -> Tensor:
        """Return one-hot actions [*lead, A] as class indices. Raises ValueError for another shape."""
        if tuple(actions.shape) != (*lead, self.action_dim):
            raise ValueError(f"{where}: actions are {tuple(actions.shape)}, expected {(*lead, self.action_dim)}.")
        return actions.argmax(-1)

    def _grey(self, batch: int) -> Dream:
        n, device = self.config.context, self.device
        frames = torch.zeros(batch, n, *self.obs_shape, device=device)
        return Dream(frames, frames.new_zeros(batch, n - 1, dtype=torch.long), self.reward_end.lstm.initial(batch))


def as_dream(state: LatentState) -> Dream:
    """Return a `LatentState` as this model's. Raises ValueError for a state of another kind of model."""
    if lacking := {"frames", "actions", "cell", "moved"} - state.memory.keys():
        raise ValueError(f"the state remembers no {', '.join(sorted(lacking))}, expected a state that this model made.")
    return Dream(state.memory["frames"], state.memory["actions"], (state.deterministic, state.memory["cell"]))
