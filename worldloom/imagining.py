"""The parts that agents share whose policy learns in imagination: updates, checkpoints, and what rebuilds them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from worldloom.arguments import check_act_state
from worldloom.capture import Captured, Tensors
from worldloom.gang import ALONE, Gang
from worldloom.generators import restore_generator
from worldloom.learner import Learner
from worldloom.nets import autocast, flatten, load_flat
from worldloom.observations import as_mapping
from worldloom.staging import Columns
from worldloom.tally import Tally
from worldloom.types import ActState, Array, Batch, Metrics, ObsArray, Precision, split_obs


class ImaginingUpdate:
    """The parts that updates share: random numbers, metrics, the precision of products, and the gang of learners.

    seed: of the generator, on the model's device.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.tally, self._dtype = Tally(), torch.float32
        self.gang: Gang = ALONE
        self.device = next(model.parameters()).device
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device, self._dtype)


class ImaginingAgent(ABC):
    """An agent made of a world model, a behaviour that acts, and the update that trains both.

    A family adds `_choose` and `_fresh`, the windows and columns that it reads, and its acting tensors;
    `worldloom.types.Agent` describes the methods. learning: returns its `Update`, which has `configure`,
    `state_dict` and `load_state_dict` too, for model, behaviour and a seed. action_classes: the choices of each one-hot
    part of an action; () for continuous actions.
    """

    true_ends_hint: str | None = None
    plans = False
    world_model: Any
    behaviour: Any

    def __init__(
        self,
        model: nn.Module,
        behaviour: nn.Module,
        learning: Callable[[Any, Any, int], Any],
        action_classes: tuple[int, ...],
        seed: int,
    ) -> None:
        self.world_model, self.behaviour = model, behaviour
        self.action_classes, self.device = tuple(action_classes), next(model.parameters()).device
        self.acting_generator = torch.Generator(self.device).manual_seed(seed)
        self._act = Captured(self._choose, self.device, self.acting_generator)
        self._learner = Learner(partial(learning, model, behaviour, seed + 1), self.device)

    # Acting

    @torch.inference_mode()
    def act(
        self,
        obs: ObsArray,
        act_state: ActState | None,
        is_first: Array,
        explore: bool = True,  # noqa: ARG002 - the references sample in evaluation too
    ) -> tuple[Array, ActState]:
        """Return actions [E, A] for obs [E, *obs_shape], one-hot or drawn from the normal and not clipped, and the new
        act_state. Raises ValueError for obs of other keys or shapes, or an act_state of another number of rows."""
        shown = {name: torch.as_tensor(value) for name, value in as_mapping(obs).items()}
        shown = self.world_model.as_mapping(shown, "act", 1)
        state = self._previous(act_state, len(next(iter(shown.values()))))
        kept = self._act.own(self._act({**split_obs(shown), "is_first": torch.as_tensor(is_first), **state}))
        return kept["action"].cpu().numpy().copy(), kept  # what is done to it must not change act_state

    @abstractmethod
    def _choose(self, given: Tensors) -> Tensors:
        """Return actions, and the act_state after them; runs on the device alone."""

    @abstractmethod
    def _fresh(self, envs: int) -> dict[str, Tensor]:
        """Return the act_state of environments that were never acted in."""

    def _previous(self, act_state: ActState | None, envs: int) -> dict[str, Tensor]:
        if act_state is None:
            return self._fresh(envs)
        check_act_state(act_state, envs)
        return dict(act_state)

    # Learning

    @property
    def learning(self) -> Any:
        """Return the family's `Update`, made at its first use."""
        return self._learner.update

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

        A step whose loss or gradient is not finite changes nothing. Raises FloatingPointError after several of them in
        a row, ValueError for a batch of other keys or shapes.
        """
        columns = self.learn(batch)
        return self.collect(), columns.arrays()

    def learn(self, batch: Batch) -> Columns:
        """Make an update without waiting for the device; return columns to read once they have arrived."""
        return self._learner.learn(batch)

    def collect(self) -> Metrics:
        """Return means since the last call. Waits for the device. Raises FloatingPointError as `update`."""
        return self._learner.collect()

    # Exchange

    def replay_columns(self, act_state: ActState) -> dict[str, Array]:  # noqa: ARG002 - the protocol's argument
        """Return {}: acting makes nothing for replay to store. A family whose acting does has a method of its own."""
        return {}

    @abstractmethod
    def _acting_tensors(self) -> list[Tensor]:
        """Return what acting needs, and nothing else: parameters, and buffers that learning changes."""

    def acting_weights(self) -> Array:
        return flatten(self._acting_tensors())

    def load_acting_weights(self, flat: Array) -> None:
        load_flat(self._acting_tensors(), flat)

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
