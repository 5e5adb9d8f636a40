"""The normal way to run: learner and env actors are kept busy, and none waits for another's turn."""

from __future__ import annotations

from distributed.parts import Parts
from distributed.recovery import Recovery
from distributed.state import Limits
from worldloom.interrupt import GracefulStop
from worldloom.runs.config import CHUNKS_PER_SECOND, RunConfig

UPDATES_IN_FLIGHT = 2  # tasks at the learner: one being learned from, one whose batches are on the way
UPDATES_PER_TASK = 8  # at most


class FreeRunning:
    """Keeps learner and env actors busy within the train ratio, and takes in whatever is ready."""

    def __init__(self, parts: Parts, recovery: Recovery) -> None:
        self._parts, self._recovery = parts, recovery

    @staticmethod
    def limits(config: RunConfig) -> Limits:
        return Limits(UPDATES_IN_FLIGHT, UPDATES_PER_TASK, config.runtime.chunk_steps, CHUNKS_PER_SECOND)

    def advance(self, stop: GracefulStop) -> None:  # noqa: ARG002 - see Lockstep
        """Give work to everybody, and take in what is ready."""
        parts = self._parts
        parts.learning.dispatch()
        parts.collecting.dispatch()
        here = parts.collecting.own is not None and parts.collecting.collect_here()
        parts.take_ready(timeout=0 if here else 1.0)
        self._recovery.leave_draining_nodes()

    def after_interval(self) -> None:
        """Do nothing: evaluations are played while the run goes on."""

    def after_checkpoint(self) -> None:
        """Do nothing: collecting goes on across it."""
