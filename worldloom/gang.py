"""Several learners that make one update together, each from its share of the batch: the same algorithm as one learner.

All draw the random numbers of the whole batch from equal generators, and keep their share. Statistics over a batch are
those of the whole batch, and gradients are means over all learners, so that parameters stay equal everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

gather_ = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name since torch 2.13


@dataclass(frozen=True)
class Gang:
    """One learner's place among `size` of them; rank is in 0..size-1.

    group: of torch.distributed, None for the default one. Every learner must make the same calls in the same order.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def share(self, whole: Tensor, dim: int) -> Tensor:
        """Return this learner's part of an array for the whole batch. Raises ValueError unless `size` divides `dim`."""
        if whole.shape[dim] % self.size:
            raise ValueError(f"share: axis {dim} of {tuple(whole.shape)} does not divide among {self.size} learners.")
        return whole if self.size == 1 else whole.chunk(self.size, dim)[self.rank]

    def gather(self, part: Tensor) -> Tensor:
        """Return the values of all learners as one flat array; part: the same shape everywhere, without gradient."""
        if self.size == 1:
            return part
        whole = part.new_empty(self.size * part.numel())
        gather_(whole, part.detach().contiguous().flatten(), group=self.group)
        return whole

    def mean(self, gradient: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means over all learners of a flat gradient [P] and a scalar loss, in one collective call."""
        if self.size == 1:
            return gradient, loss.detach()
        both = torch.cat([gradient, loss.detach().to(gradient.dtype).reshape(1)])
        dist.all_reduce(both, group=self.group)
        both /= self.size
        return both[:-1], both[-1]


ALONE = Gang()
