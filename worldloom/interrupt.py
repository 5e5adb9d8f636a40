"""Ctrl-C: pressed once, the run finishes its work in progress, saves and ends; pressed twice, it stops at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


class StopAtOnce(KeyboardInterrupt):
    """The error that the second Ctrl-C raises, and SIGTERM while a run starts, wherever the program is."""


class GracefulStop:
    """A context in which SIGINT and SIGTERM set `requested`; a second SIGINT raises StopAtOnce."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():  # signals cannot be handled elsewhere
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def take_back(self) -> None:
        """Handle the signals again after a call that may have taken them, as ray.init takes SIGTERM."""
        for number in self._before:
            signal.signal(number, self._handle)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise StopAtOnce
        self.requested = True


@contextlib.contextmanager
def sigterm_stops_at_once() -> Iterator[None]:
    """A context in which SIGTERM raises StopAtOnce: while a run starts, there is nothing to save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _stop_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop_at_once(_number: int, _frame: FrameType | None) -> None:
    raise StopAtOnce


def is_ctrl_c(error: KeyboardInterrupt) -> bool:
    """Return whether the user's Ctrl-C raised this error, and not a program that happens to use its class."""
    if isinstance(error, StopAtOnce):
        return True
    in_main = threading.current_thread() is threading.main_thread()  # the only one that signals reach
    return in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
