"""Transfer of batches to the device, and of replay columns back, while host and device go on working."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from worldloom.types import Array


@dataclass
class Slot:
    """Pinned memory for one batch, and its copy on the device."""

    pinned: dict[str, Tensor] = field(default_factory=dict)
    sent: dict[str, Tensor] = field(default_factory=dict)
    copied: torch.cuda.Event = field(default_factory=torch.cuda.Event)  # recorded once `pinned` was read
    used: torch.cuda.Event = field(default_factory=torch.cuda.Event)  # recorded once the update has read `sent`


class Staging:
    """Copies each batch to the device on a stream of its own, while the previous update computes.

    Two slots take turns. On other devices than CUDA, and for tensors that are on the device already, a batch stays as
    it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._turn = device, 0
        self._slots: list[Slot] = []

    def send(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch on the device; the current stream waits for it, the host does not."""
        if self._device.type != "cuda" or any(value.is_cuda for value in batch.values()):
            return dict(batch)
        if not self._slots:
            self._slots, self._stream = [Slot(), Slot()], torch.cuda.Stream(self._device)
        current, other = torch.cuda.current_stream(self._device), self._slots[1 - self._turn]
        other.used.record(current)  # all work that reads the other slot was launched before
        slot = self._slots[self._turn]
        slot.copied.synchronize()
        if {n: (v.shape, v.dtype) for n, v in batch.items()} != {n: (v.shape, v.dtype) for n, v in slot.sent.items()}:
            slot.used.synchronize()
            slot.pinned = {n: torch.empty(v.shape, dtype=v.dtype, pin_memory=True) for n, v in batch.items()}
            slot.sent = {n: torch.empty(v.shape, dtype=v.dtype, device=self._device) for n, v in batch.items()}
            self._stream.wait_stream(current)
        for name, value in batch.items():
            slot.pinned[name].copy_(value)
        self._stream.wait_event(slot.used)
        with torch.cuda.stream(self._stream):
            for name, pinned in slot.pinned.items():
                slot.sent[name].copy_(pinned, non_blocking=True)
            slot.copied.record(self._stream)
        current.wait_event(slot.copied)
        self._turn = 1 - self._turn
        return slot.sent


class Columns:
    """Replay columns that an update made. On CUDA copies leave the device at once, and the host does not wait."""

    def __init__(self, made: Mapping[str, Tensor]) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._values = dict(made)
        if any(value.is_cuda for value in made.values()):
            self._values = {
                name: torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
                for name, value in made.items()
            }
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def arrays(self) -> dict[str, Array]:
        """Return arrays [B, T, ...] by name. Waits until they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return {name: value.numpy() for name, value in self._values.items()}
