"""A learner that runs an agent's updates one after the other, while the host does not wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Generic, Protocol, TypeVar

import torch
from torch import Generator, Tensor

from worldloom.capture import Captured, Tensors
from worldloom.memory import keep_freed_memory
from worldloom.staging import Columns, Staging
from worldloom.tally import Tally
from worldloom.types import Batch, Metrics


class Update(Protocol):
    """One update of a family, in the two parts that a learner runs."""

    generator: Generator  # source of everything random in `core`
    tally: Tally  # sums of the metrics

    def stage(self, batch: Batch) -> dict[str, Tensor]:
        """Return what `core` reads of a batch, by name, on any device. Raises ValueError for another kind of batch."""

    def core(self, given: Tensors) -> Tensors:
        """Make the update on the device alone; return columns for replay [B, T, ...].

        Nothing is read back to the host, and no number in Python changes from one update to the next, so that the whole
        of it can be one CUDA graph.
        """


U = TypeVar("U", bound=Update)


class Learner(Generic[U]):
    """Stages batches, runs an update's `core` on them (as one CUDA graph on CUDA), and counts updates.

    make: returns the update. It is called at the first use, so that an agent that only acts has no optimiser, which
    holds two numbers for each parameter.
    """

    def __init__(self, make: Callable[[], U], device: torch.device) -> None:
        self._make, self._device, self._staging = make, device, Staging(device)
        self.updates = 0
        if device.type == "cpu":
            keep_freed_memory()

    @cached_property
    def update(self) -> U:
        return self._make()

    @cached_property
    def captured(self) -> Captured:
        return Captured(self.update.core, self._device, self.update.generator)

    def learn(self, batch: Batch) -> Columns:
        """Make one update without waiting for the device; return replay columns, perhaps still on their way."""
        columns = self.captured(self._staging.send(self.update.stage(batch)))
        self.updates += 1
        return Columns(columns)

    def collect(self) -> Metrics:
        """Return means of the metrics since the last call. Waits for the device.

        Raises FloatingPointError after several updates in a row with a loss or gradient that is not finite.
        """
        return self.update.tally.read()

    def resume(self, updates: int) -> None:
        """Continue counting from `updates`, after parameters or optimiser states were replaced."""
        self.updates = updates
        self.captured.forget()
