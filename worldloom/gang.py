"""Several learners that make one update together, each from its share of the batch: the same algorithm as one learner.

All draw the random numbers of the whole batch from equal generators, and keep their share. Statistics over a batch are
those of the whole batch, and gradients are means over all learners, so that parameters stay equal everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

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

    def whole(self, part: Tensor) -> Tensor:
        """Return the rows [N, ...] of all learners, [size N, ...], the same everywhere; N is the same everywhere.

        For a loss of the whole batch, which each learner computes: its gradient reaches a learner's own rows `size`
        times, so that the mean of all learners' gradients is the gradient of that loss.
        """
        return part if self.size == 1 else cast(Tensor, _Whole.apply(part, self))  # type: ignore[no-untyped-call]

    def average(self, part: Tensor) -> Tensor:
        """Return the mean over all learners of an array of one shape everywhere, with gradient.

        A loss of it is one of the whole batch: its gradient, too, is the mean of those that all learners have.
        """
        return part if self.size == 1 else cast(Tensor, _Average.apply(part, self))  # type: ignore[no-untyped-call]

    def mean(self, gradient: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means over all learners of a flat gradient [P] and a scalar loss, in one collective call."""
        if self.size == 1:
            return gradient, loss.detach()
        both = self.summed(torch.cat([gradient, loss.detach().to(gradient.dtype).reshape(1)]))
        both /= self.size
        return both[:-1], both[-1]

    def summed(self, part: Tensor) -> Tensor:
        """Add up an array of one shape in place, over all learners; return it."""
        dist.all_reduce(part, group=self.group)
        return part


class _Whole(torch.autograd.Function):
    """`Gang.whole`, whose backward pass needs nothing of the other learners."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, gang: Gang) -> Tensor:
        ctx.gang = gang
        return gang.gather(part).view(-1, *part.shape[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.gang.share(gradients[0], 0) * ctx.gang.size, None


class _Average(torch.autograd.Function):
    """`Gang.average`, whose backward pass is another mean over all learners."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, gang: Gang) -> Tensor:
        ctx.gang = gang
        return _averaged(part, gang)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _averaged(gradients[0], ctx.gang), None


def _averaged(part: Tensor, gang: Gang) -> Tensor:
    return gang.summed(part.clone(memory_format=torch.contiguous_format)).div_(gang.size)


ALONE = Gang()
