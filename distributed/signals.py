"""SIGTERM in a cluster that the driver started: `timeout`, SLURM and systemd send it to all; only the driver heeds it.

The driver needs the others to save, and ends them then. Ray itself keeps SIGINT from them in the same way.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def sigterm_blocked() -> Iterator[None]:
    """Block SIGTERM in this thread; what it starts meanwhile, and all that comes from that, keeps it blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_sigterm() -> None:
    """Take SIGTERM and do nothing, where it was blocked: blocked on, it could not end the processes of an environment.

    Call it in the main thread, before others start. In a cluster that somebody else started it changes nothing.
    """
    if signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, []):
        return
    signal.signal(signal.SIGTERM, lambda *_: None)  # programs that are started get the default instead
    os.register_at_fork(after_in_child=_heed)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _heed() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
