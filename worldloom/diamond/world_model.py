"""DIAMOND's world model: a denoiser draws frames, and a recurrent model tells their rewards and ends."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from worldloom.arguments import check_batch
from worldloom.diamond.config import DiamondConfig
from worldloom.diamond.denoiser import Denoiser, DenoisingNoise, FrameNoise
from worldloom.diamond.reward_end import Memory, Outcome, RewardEnd
from worldloom.diamond.rows import Rows, as_frames, as_images, draw_stretch
from worldloom.pretrained import save_model
from worldloom.types import Batch, LatentState, Obs, ObsShape, Trajectory, is_image

FLAGS = ("is_first", "terminated", "truncated")


@dataclass(frozen=True)
class WorldNoise:
    """All random numbers of a world model's losses."""

    rows: Tensor  # [B] uniform in [0, 1): which rows of a window the denoiser takes
    denoising: DenoisingNoise


@dataclass(frozen=True)
class Dream:
    """A state of B environments, as the model's own parts read it."""

    frames: Tensor  # [B, n, C, S, S], the present frame last
    actions: Tensor  # [B, n - 1] class indices, the moves between these frames
    memory: Memory  # of the LSTM of rewards and ends, [B, D] each

    def after(self, action: Tensor, frame: Tensor, memory: Memory) -> Dream:
        """Return the state after action [B] led to frame [B, C, S, S]."""
        frames = torch.cat([self.frames[:, 1:], frame.unsqueeze(1)], 1)
        return Dream(frames, torch.cat([self.actions, action.unsqueeze(1)], 1)[:, 1:], memory)

    def moves(self, action: Tensor) -> Tensor:
        """Return the n moves out of the frames [B, n], of which action [B] is the last."""
        return torch.cat([self.actions, action.unsqueeze(1)], 1)


class DiamondWorldModel(nn.Module):
    """DIAMOND's world model, of one square image [C, S, S] and one choice out of A = action_dim actions.

    The state of an environment: `deterministic` is the hidden state of the LSTM of rewards and ends, which its heads
    read; `memory` holds the last n frames, the n - 1 actions between them, the LSTM's cell state, and reward and chance
    to go on of the move that led here. `predict` draws a frame from torch's own generator. Raises ValueError for other
    observations, and for sides that the encoders cannot halve.
    """

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
        step = 2 ** max(c.reward_levels - 1, c.policy_levels)
        if isinstance(obs_shape, Mapping) or not is_image(tuple(obs_shape)) or obs_shape[1] != obs_shape[2]:
            shown = dict(obs_shape) if isinstance(obs_shape, Mapping) else tuple(obs_shape)
            raise ValueError(
                f"obs_shape is {shown}, but DIAMOND reads one square image, (C, S, S). Use another family, or set "
                "env.image_size."
            )
        if obs_shape[1] % step:
            raise ValueError(
                f"obs_shape is {tuple(obs_shape)}, but DIAMOND's encoders halve the sides to 1/{step}. Set "
                f"env.image_size to a multiple of {step}, or choose fewer agent.policy_levels and agent.reward_levels."
            )
        self.obs_shape: tuple[int, ...] = tuple(obs_shape)
        self.action_dim, self.episode_length = action_dim, episode_length
        self.denoiser = Denoiser(self.obs_shape, action_dim, c)
        self.reward_end = RewardEnd(self.obs_shape, action_dim, c)

    @property
    def device(self) -> torch.device:
        return self.denoiser.noise_emb.device

    # WorldModel

    def initial_state(self, batch_size: int) -> LatentState:
        return self._as_latent(self._grey(batch_size), None)

    def encode(self, obs: Obs) -> LatentState:
        """Return the state after seeing only obs [B, C, S, S], uint8 or floats in [0, 1], after grey frames."""
        frame = self._frame("encode", obs)
        before = self._grey(len(frame))
        frames = torch.cat([before.frames[:, 1:], frame.unsqueeze(1)], 1)
        memory = self.reward_end.burn_in(frames, before.actions)
        return self._as_latent(Dream(frames, before.actions, memory), None)

    def predict(self, state: LatentState, action: Tensor) -> LatentState:
        chosen, dream = self._chosen("predict", action, state.batch_size), self.as_dream(state)
        noise = self.denoiser.draw_frame_noise([state.batch_size], None)
        return self._moved(dream, chosen, self.next_frame(dream, chosen, noise))

    def observe(self, state: LatentState, action: Tensor, obs: Obs) -> LatentState:
        chosen, frame = self._chosen("observe", action, state.batch_size), self._frame("observe", obs)
        if len(frame) != state.batch_size:
            raise ValueError(f"observe: {len(frame)} observations, expected {state.batch_size}: one for each state.")
        return self._moved(self.as_dream(state), chosen, frame)

    def decode(self, state: LatentState) -> dict[str, Any]:
        """Return `obs` [B, C, S, S] in [0, 1], and of the move that led here `reward` [B, 1], the expected sign of the
        reward in [-1, 1], and `continue` [B, 1]; 0 and 1 where no move led here."""
        frames = self.as_dream(state).frames
        return {
            "obs": as_images(frames[:, -1]),
            "reward": state.memory["reward"],
            "continue": state.memory["goes_on"],
        }

    def imagine(self, state: LatentState, actions: Tensor) -> Trajectory:
        """Roll the model forward under actions [T, B, A]; rewards are expected signs of rewards, in [-1, 1]."""
        states = [state]
        for action in actions:
            states.append(self.predict(states[-1], action))
        told = [state.memory for state in states[1:]]
        rewards, continues = (torch.stack([each[name] for each in told]) for name in ("reward", "goes_on"))
        return Trajectory(tuple(states), rewards, continues)

    def compute_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return `loss`, the sum of `denoising_loss`, `reward_loss` and `end_loss`; scalars. Raises ValueError for a
        batch with fewer rows than the denoiser takes, n + 1 + autoregressive."""
        check_batch(batch)
        rows = self.rows(batch)
        count, least = rows.frames.shape[1], self.config.denoised_rows
        if count < least:
            raise ValueError(f"the batch has {count} rows, expected at least {least}: context and denoised frames.")
        losses = self.losses(rows, self.draw_noise(len(rows.frames)))
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def update_targets(self) -> None:
        """Do nothing: this model learns from no slow copies."""

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        save_model(directory, self.describe(), self)

    def describe(self) -> dict[str, Any]:
        return {
            "family": "diamond",
            "obs_shape": list(self.obs_shape),
            "action_dim": self.action_dim,
            "episode_length": self.episode_length,
            "config": dataclasses.asdict(self.config),
        }

    # Learning and imagination

    def draw_noise(self, batch: int, generator: Generator | None = None) -> WorldNoise:
        """Draw the random numbers of `losses` for B = batch windows."""
        share = torch.rand(batch, generator=generator, device=self.device)
        return WorldNoise(share, self.denoiser.draw_noise(batch, generator))

    def losses(self, rows: Rows, noise: WorldNoise) -> dict[str, Tensor]:
        """Return the losses of both parts, scalars: the denoiser takes some rows of each window, the other all."""
        denoised = draw_stretch(rows, noise.rows, self.config.denoised_rows)
        reward_loss, end_loss = self.reward_end.losses(
            rows.frames, rows.actions, rows.rewards, rows.terminated, rows.is_first
        )
        return {
            "denoising_loss": self.denoiser.loss(*denoised, noise.denoising),
            "reward_loss": reward_loss,
            "end_loss": end_loss,
        }

    def next_frame(self, dream: Dream, action: Tensor, noise: FrameNoise) -> Tensor:
        """Draw the frame [B, C, S, S] that action [B] leads to."""
        return self.denoiser.sample(dream.frames, dream.moves(action), noise)

    def outcome(self, dream: Dream, action: Tensor, frame: Tensor) -> tuple[Outcome, Dream]:
        """Return the outcome of the move by action [B] to frame [B, C, S, S], and the state after it."""
        memory = self.reward_end.step(dream.frames[:, -1], action, frame, dream.memory)
        return self.reward_end.outcome(memory[0]), dream.after(action, frame, memory)

    # Conversions

    def rows(self, batch: Batch) -> Rows:
        """Return a batch as this model's rows; flags that are missing are False. Raises ValueError for bad shapes."""
        frames = self._frame("batch['obs']", batch["obs"], 2)
        lead = tuple(frames.shape[:2])
        given = {name: batch[name] for name in FLAGS if name in batch}  # type: ignore[literal-required]
        if "terminated" not in given and "continues" in batch:
            given["terminated"] = batch["continues"] == 0
        never = torch.zeros(lead, dtype=torch.bool, device=frames.device)
        flags = {name: given[name].bool() if name in given else never for name in FLAGS}
        actions, rewards = self._chosen("batch['actions']", batch["actions"], *lead), batch["rewards"].float()
        for name, value in {"rewards": rewards, **flags}.items():
            if tuple(value.shape) != lead:
                raise ValueError(f"batch[{name!r}] is {tuple(value.shape)}, expected {lead}.")
        return Rows(frames, actions * ~flags["is_first"], rewards, **flags)

    def as_dream(self, state: LatentState) -> Dream:
        """Return a `LatentState` as this model's. Raises ValueError for a state of another kind of model."""
        kept = state.memory
        if lacking := {"frames", "actions", "cell", "reward", "goes_on"} - kept.keys():
            raise ValueError(f"the state remembers no {', '.join(sorted(lacking))}, expected one of this model.")
        return Dream(kept["frames"], kept["actions"], (state.deterministic, kept["cell"]))

    def _as_latent(self, dream: Dream, outcome: Outcome | None) -> LatentState:
        hidden, cell = dream.memory
        reward = torch.zeros_like(hidden[:, 0]) if outcome is None else outcome.expected_reward()
        goes_on = torch.ones_like(hidden[:, 0]) if outcome is None else outcome.continues()
        told = {"reward": reward.unsqueeze(1), "goes_on": goes_on.unsqueeze(1)}
        return LatentState(hidden, memory={"frames": dream.frames, "actions": dream.actions, "cell": cell, **told})

    def _moved(self, dream: Dream, action: Tensor, frame: Tensor) -> LatentState:
        outcome, after = self.outcome(dream, action, frame)
        return self._as_latent(after, outcome)

    def _grey(self, batch: int) -> Dream:
        n, device = self.config.context, self.device
        frames = torch.zeros(batch, n, *self.obs_shape, device=device)
        actions = torch.zeros(batch, n - 1, dtype=torch.long, device=device)
        return Dream(frames, actions, self.reward_end.initial(batch))

    def _frame(self, where: str, obs: Obs, lead: int = 1) -> Tensor:
        """Return images [..., C, S, S] as frames. Raises ValueError for a mapping, another shape or kind of number."""
        if isinstance(obs, Mapping):
            raise ValueError(f"{where}: obs is a mapping with {sorted(obs)}, expected one image.")
        if tuple(obs.shape[lead:]) != self.obs_shape or obs.ndim != lead + 3:
            letters = ", ".join(("B", "T")[:lead])
            raise ValueError(f"{where}: obs is {tuple(obs.shape)}, expected [{letters}, {self.obs_shape}].")
        return as_frames(obs)

    def _chosen(self, where: str, actions: Tensor, *lead: int) -> Tensor:
        """Return one-hot actions [..., A] as class indices [...]. Raises ValueError for another shape."""
        if tuple(actions.shape) != (*lead, self.action_dim):
            raise ValueError(f"{where}: actions are {tuple(actions.shape)}, expected {(*lead, self.action_dim)}.")
        return actions.argmax(-1)
