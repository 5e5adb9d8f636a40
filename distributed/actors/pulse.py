"""What all actors answer on their control thread: process id, node, and how long the current call has taken."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

import ray

from distributed.signals import outlive_sigterm

Actor = TypeVar("Actor", bound="Process")
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


class Process:
    """An actor's process: where it runs, whether it lives, and how its work thread gets on."""

    def __init__(self) -> None:
        outlive_sigterm()
        self.pulse_clock = Pulse()

    @ray.method(concurrency_group="control")
    def pulse(self) -> tuple[float, bool]:
        """See `Pulse.read`."""
        return self.pulse_clock.read()

    @ray.method(concurrency_group="control")
    def pid(self) -> int:
        return os.getpid()

    @ray.method(concurrency_group="control")
    def node(self) -> str:
        """Return the id of this node."""
        return str(ray.get_runtime_context().get_node_id())


def timed(method: Callable[Concatenate[Actor, Given], Made]) -> Callable[Concatenate[Actor, Given], Made]:
    """Run the clock of an actor while a method of its work thread runs."""

    @functools.wraps(method)
    def call(self: Actor, /, *args: Given.args, **kwargs: Given.kwargs) -> Made:
        self.pulse_clock.progress()
        try:
            return method(self, *args, **kwargs)
        finally:
            self.pulse_clock.since = None

    return call
