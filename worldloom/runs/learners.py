"""Several learners in a run: the numbers that divide a batch, joining their agents, and a hash of their parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from worldloom.gang import Gang

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers by their bytes


def divisors(batch_size: int) -> list[int]:
    """Return the numbers of learners that can share a batch of so many windows, the smallest first."""
    return [number for number in range(1, batch_size + 1) if batch_size % number == 0]


def check_share(learners: int, batch_size: int) -> None:
    """Raise ValueError if so many learners cannot have equal shares of a batch of `batch_size` windows."""
    if batch_size % learners:
        *most, last = map(str, divisors(batch_size))
        expected = f"{', '.join(most)} or {last}" if most else last
        raise ValueError(
            f"runtime.learners is {learners}, expected a number that divides the {batch_size} windows of a batch "
            f"(agent.batch_size): {expected}."
        )


def join(agent: Any, gang: Gang, algorithm: str) -> None:
    """Have an agent make its updates together with the others of a gang. Raises ValueError if its family cannot."""
    joined = getattr(getattr(agent, "learning", None), "join", None)
    if joined is None:
        raise ValueError(
            f"runtime.learners is {gang.size}, expected 1 with {algorithm}: updates of its family cannot be shared, "
            "since its agent has no learning.join(gang)."
        )
    joined(gang)


def carried_of(agent: Any) -> list[Tensor]:
    """Return, in a fixed order, all that one update of an agent hands to the next: parameters, buffers, and what
    `learning.state_dict()` has of optimisers, statistics and the state of the generator of noise."""
    modules = [agent.world_model, *([] if agent.behaviour is None else [agent.behaviour])]
    parts = [*modules, *(part for part in [getattr(agent, "learning", None)] if hasattr(part, "state_dict"))]
    return list(_tensors([part.state_dict() for part in parts]))


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value)


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Return a hash of all bits of these tensors, computed on the device of the first of them: equal for equal bits
    alone, but for chance.

    Of each tensor x, as whole numbers: the sum of (2 i + 1) x_i modulo 2^64. Whole numbers have the same sum in any
    order, so that it is the same on every device.
    """
    sums: list[Tensor] = []
    for tensor in tensors:
        words = tensor.detach().to(sums[0].device if sums else tensor.device).contiguous().flatten()
        words = words.view(WORDS[words.element_size()]).long()
        sums.append((words * torch.arange(1, 2 * len(words) + 1, 2, device=words.device)).sum())
    return hashlib.blake2b(repr(torch.stack(sums).tolist()).encode(), digest_size=8).hexdigest()
