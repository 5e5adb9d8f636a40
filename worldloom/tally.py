"""Sums of an agent's metrics on its device, read on request only, so that the host need not wait for an update."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from worldloom.types import Metrics

SKIPPED_IN_A_ROW = 5  # updates with a NaN or infinite loss or gradient; that many end the run


class Tally:
    """Means of metrics over the updates since the last `read`. An update that was skipped, because its loss or gradient
    was not finite, counts in `skipped_updates` alone."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._sums = torch.zeros(3)  # one for each metric; then updates made, skipped, and skipped in a row
        self._last = torch.zeros(0)

    def prepare(self, device: torch.device, count: int) -> None:
        """Make room for `count` metrics. The buffers keep their addresses afterwards, as a CUDA graph requires."""
        if len(self._sums) != count + 3:
            self._sums = torch.zeros(count + 3, device=device)
            self._last = torch.zeros(count, device=device)

    @torch.no_grad()
    def add(self, scalars: Mapping[str, Tensor], made: Tensor) -> None:
        """Add one update's metrics, scalars by name. made: bool scalar, False if it was skipped. Reads nothing back."""
        self.names = list(scalars)
        values = torch.stack([value.detach().float() for value in scalars.values()])
        self.prepare(values.device, len(values))
        skipped = (~made).float()
        self._last.copy_(values)
        self._sums[:-3] += torch.where(made, values, 0.0)
        self._sums[-3] += made
        self._sums[-2] += skipped
        self._sums[-1].add_(1).mul_(skipped)

    def read(self) -> Metrics:
        """Wait for the device; return means by name and `skipped_updates`, a share in [0, 1]; clear the sums.

        Raises FloatingPointError if the last SKIPPED_IN_A_ROW updates were skipped, and names what is not finite.
        """
        *sums, made, skipped, in_a_row = self._sums.tolist()
        if in_a_row >= SKIPPED_IN_A_ROW:
            raise FloatingPointError(self._explain())
        self._sums[:-1].zero_()
        means = {name: total / made for name, total in zip(self.names, sums, strict=True)} if made else {}
        return {**means, "skipped_updates": skipped / max(made + skipped, 1)}

    def _explain(self) -> str:
        last = torch.isfinite(self._last).tolist()
        bad = [name for name, fine in zip(self.names, last, strict=True) if not fine and _is_loss(name)]
        return (
            f"{SKIPPED_IN_A_ROW} updates in a row gave NaN or infinity in {', '.join(bad) or 'a gradient'}; none of "
            "them was made. Look for huge rewards or observations; lower agent.lr, or go on from the last checkpoint "
            "with --resume."
        )


def _is_loss(name: str) -> bool:
    return name.endswith("_loss") or name.startswith("reconstruction/")
