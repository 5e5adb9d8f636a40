"""STORM's world model: its networks behind the API that all families share (`worldloom.types.WorldModel`)."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor

from worldloom.arguments import check_action, check_batch
from worldloom.nets import Statistics
from worldloom.observations import as_lists
from worldloom.pretrained import save_model
from worldloom.storm.losses import draw_world_noise, world_losses
from worldloom.storm.networks import STORMNetworks
from worldloom.types import Batch, LatentState, Obs, Trajectory


class STORMWorldModel(STORMNetworks):
    """STORM's world model; `STORMNetworks` describes its arguments."""

    _seen: Statistics | None = None  # by the batch norms in the last `compute_loss`

    def encode(self, obs: Obs) -> LatentState:
        """Return the posterior after seeing only obs [B, *obs_shape]; images are uint8, or floats in [0, 1].
        Raises ValueError that names the key of a missing or wrong observation."""
        shown = self.as_mapping(obs, "encode", 1)
        rows = len(next(iter(shown.values())))
        return dataclasses.replace(self._begin(rows), stochastic=self.see(shown, self.draw_noise(rows))[1])

    def predict(self, state: LatentState, action: Tensor) -> LatentState:
        moved = self._move("predict", state, action)
        z = self.draw(self.log_probs(self.prior(moved.deterministic)), self.draw_noise(state.batch_size))
        return dataclasses.replace(moved, stochastic=z)

    def observe(self, state: LatentState, action: Tensor, obs: Obs) -> LatentState:
        moved, shown = self._move("observe", state, action), self.as_mapping(obs, "observe", 1)
        rows = len(next(iter(shown.values())))
        if rows != state.batch_size:
            raise ValueError(f"observe: {rows} observations, expected {state.batch_size}: one for each state.")
        return dataclasses.replace(moved, stochastic=self.see(shown, self.draw_noise(rows))[1])

    def _move(self, where: str, state: LatentState, action: Tensor) -> LatentState:
        check_action(where, action, (state.batch_size, self.action_dim))
        if state.stochastic is None or not {"tokens", "filled"} <= state.memory.keys():
            raise ValueError(f"{where}: the state has no tokens, expected a state that this model made.")
        memory, filled = state.memory["tokens"], state.memory["filled"]
        return self._state(*self.advance(memory, filled, state.stochastic, action, filled == 0), state.stochastic)

    def _state(self, memory: Tensor, filled: Tensor, h: Tensor, z: Tensor) -> LatentState:
        return LatentState(h, z, self.config.classes, memory={"tokens": memory, "filled": filled})

    def initial_state(self, batch_size: int) -> LatentState:
        """Return the state before any observation: no token yet; that of zeros is first, whatever the action."""
        tokens, filled = self.empty_memory(batch_size)
        return dataclasses.replace(self._begin(batch_size), memory={"tokens": tokens, "filled": filled})

    def _begin(self, rows: int) -> LatentState:
        """Return the token of zeros, and a latent of zeros."""
        z = torch.zeros(rows, self.config.stoch * self.config.classes, device=self.bins.device)
        return self._state(*self.advance(*self.empty_memory(rows), z, z.new_zeros(rows, self.action_dim)), z)

    def decode(self, state: LatentState) -> dict[str, Any]:
        """Return `obs` (numbers in their units, images in [0, 1]), `reward` [B, 1] and `continue` [B, 1]."""
        assert state.stochastic is not None
        decoded = self.decoder(state.stochastic)
        shown = {name: self.decoder.shown(name, value) for name, value in decoded.items()}
        reward, going_on = self.outcome(state.deterministic)
        return {
            "obs": shown if isinstance(self.obs_shape, dict) else next(iter(shown.values())),
            "reward": reward,
            "continue": going_on,
        }

    def imagine(self, state: LatentState, actions: Tensor) -> Trajectory:
        check_action("imagine", actions, (actions.shape[0], state.batch_size, self.action_dim))
        states = [state]
        for action in actions:
            states.append(self.predict(states[-1], action))
        rewards, continues = self.outcome(torch.stack([each.deterministic for each in states[1:]]))
        return Trajectory(tuple(states), rewards, continues)

    def compute_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return `loss` and its parts: `kl_loss` (`dynamics_loss` and `representation_loss`, scaled and added),
        `reconstruction_loss` (and `reconstruction/<key>`), `reward_loss` and `termination_loss`, all scalars.

        batch: 3 to max_length + 1 rows. Batch norms use the batch's own statistics; `update_targets` then moves the
        running ones. Raises ValueError for other shapes."""
        check_batch(batch)
        lead = batch["actions"].shape
        found = world_losses(self, batch, draw_world_noise(self, lead[0], lead[1] - 1))
        self._seen = found.seen
        return {"loss": found.total, **found.parts}

    def update_targets(self) -> None:
        """Move the running statistics of batch norms towards those of the last `compute_loss`."""
        if self._seen is not None:
            self.move_statistics(self._seen, torch.ones((), dtype=torch.bool, device=self.bins.device))
        self._seen = None

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        save_model(directory, self.describe(), self)

    def describe(self) -> dict[str, Any]:
        sizes = {"family": "storm", "obs_shape": as_lists(self.obs_shape), "action_dim": self.action_dim}
        return {**sizes, "episode_length": self.episode_length, "config": dataclasses.asdict(self.config)}
