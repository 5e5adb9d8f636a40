"""The parts that agents share whose policy learns in imagination: updates, checkpoints, and what rebuilds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from worldloom.capture import Captured, Tensors
from worldloom.generators import restore_generator
from worldloom.learner import Learner
from worldloom.staging import Columns
from worldloom.types import Batch, Metrics, Precision


class ImaginingAgent:
    """An agent made of a world model, a behaviour that acts, and the update that trains both.

    A family adds `act` with `_choose`, the windows and columns that it reads, and its acting weights;
    `worldloom.types.Agent` describes the methods. learning: its `Update`, with `configure`, `state_dict` and
    `load_state_dict`. action_classes: the choices of each one-hot part of an action; () for continuous actions.
    """

    true_ends_hint: str | None = None
    plans = False
    world_model: Any
    behaviour: Any
    learning: Any

    def __init__(
        self, model: nn.Module, behaviour: nn.Module, learning: Any, action_classes: tuple[int, ...], seed: int
    ) -> None:
        self.world_model, self.behaviour, self.learning = model, behaviour, learning
        self.action_classes, self.device = tuple(action_classes), next(model.parameters()).device
        self.acting_generator = torch.Generator(self.device).manual_seed(seed)
        self._act = Captured(self._choose, self.device, self.acting_generator)
        self._learner = Learner(learning, self.device)

    def _choose(self, given: Tensors) -> Tensors:
        """Return actions, and the act_state after them; runs on the device alone."""
        raise NotImplementedError

    @property
    def updates(self) -> int:
        return self._learner.updates

    def configure_learning(self, precision: Precision, compiled: bool, capture: bool = True) -> None:
        """Set precision, compilation and CUDA graphs of `learn` and `act`; see `configure` of `learning`."""
        self._learner.captured.enabled = self._act.enabled = capture and self.device.type == "cuda"
        self.learning.configure(precision, compiled)

    def update(self, batch: Batch) -> tuple[Metrics, dict[str, Any]]:
        """Make one update, as the `core` of `learning` describes it; return metrics, and columns [B, T, ...] of the
        trained rows for replay.

        Numbers that are not finite change nothing. Raises FloatingPointError after several updates with such numbers
        in a row, ValueError for a batch of other keys or shapes.
        """
        columns = self.learn(batch)
        return self.collect(), columns.arrays()

    def learn(self, batch: Batch) -> Columns:
        """Make an update without waiting for the device; return columns to read once they have arrived."""
        return self._learner.learn(batch)

    def collect(self) -> Metrics:
        """Return means since the last call. Waits for the device. Raises FloatingPointError as `update`."""
        return self._learner.collect()

    def describe(self) -> dict[str, Any]:
        return {**self.world_model.describe(), "action_classes": list(self.action_classes)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.world_model.state_dict(),
            "behaviour": self.behaviour.state_dict(),
            **self.learning.state_dict(),
            "updates": self.updates,
            "acting_generator": self.acting_generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.world_model.load_state_dict(state["model"])
        self.behaviour.load_state_dict(state["behaviour"])
        self.learning.load_state_dict(state)
        restore_generator(self.acting_generator, state["acting_generator"])
        self._learner.resume(int(state["updates"]))
