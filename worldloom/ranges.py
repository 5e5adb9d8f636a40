"""The ranges of a config's numbers, declared in one place and checked when the config is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """An interval of numbers; its bounds belong to it unless they are open."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low:g}" if self.low_open else f"at least {self.low:g}"
        left, right = "(" if self.low_open else "[", ")" if self.high_open else "]"
        return f"a number in {left}{self.low:g}, {self.high:g}{right}"


COUNT, NATURAL = Range(1), Range(0)
POSITIVE, NOT_NEGATIVE = Range(0, low_open=True, high=math.inf), Range(0)
PROBABILITY, SHARE = Range(0, 1), Range(0, 1, high_open=True)
FINITE = Range(-1e30, 1e30)


def are_shares(values: Sequence[float]) -> bool:
    """Return whether these numbers lie in [0, 1] and sum to 1."""
    return all(value in PROBABILITY for value in values) and abs(sum(values) - 1) < 1e-6


def check_ranges(config: Any, ranges: Mapping[str, Range]) -> None:
    """Raises ValueError that names the first field whose number is not in its range; None is always allowed."""
    for name, allowed in ranges.items():
        value = getattr(config, name)
        if value is not None and (value not in allowed or math.isinf(value)):
            require(config, False, name, str(allowed))


def require(config: Any, holds: bool, name: str, expected: str) -> None:
    """Raises ValueError that names a field of an agent's config and what was expected, unless it holds."""
    if not holds:
        raise ValueError(f"agent.{name} is {getattr(config, name)!r}, expected {expected}.")
