"""How long an actor's current call has taken, for the heartbeat that its control thread answers."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

Given = ParamSpec("Given")
Made = TypeVar("Made")


@dataclass
class Pulse:
    """The clock of an actor's work thread; the control thread reads it."""

    since: float | None = None  # when the current call, or its last sign of progress, was; None while it is idle
    preparing: bool = False  # the current call may take as long as compilation does

    def progress(self) -> None:
        """Start the clock of the current call again."""
        self.since = time.monotonic()

    def read(self) -> tuple[float, bool]:
        """Return the seconds of the current call (0 while idle), and whether it is preparing."""
        since = self.since
        return (0.0 if since is None else time.monotonic() - since), self.preparing


def timed(method: Callable[Given, Made]) -> Callable[Given, Made]:
    """Run the clock of `self.pulse_clock` while a method of an actor's work thread runs."""

    @functools.wraps(method)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        clock: Any = args[0].pulse_clock  # type: ignore[attr-defined]
        clock.progress()
        try:
            return method(*args, **kwargs)
        finally:
            clock.since = None

    return call
