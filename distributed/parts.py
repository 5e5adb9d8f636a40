"""The parts of a run, and waiting for whatever they have under way."""

from __future__ import annotations

import time
from typing import Any

import ray

from distributed.collecting import Collecting
from distributed.evaluating import Evaluating
from distributed.inserting import Inserting
from distributed.learning import Learning
from distributed.saving import Checkpoints
from distributed.serving import Serving
from distributed.shards import Shards
from distributed.state import State

WAITED_TOGETHER = 50  # of so many references that are waited for, one at a time is taken in
SHORT_SECONDS = 0.02
IDLE_SECONDS = 0.02  # between two looks where nothing is under way
SETTLE_SECONDS = 10.0  # for the last collects of a run; what comes later is discarded and counted


class Parts:
    """Everything that the coordinator drives; each part owns what it has under way."""

    def __init__(self, state: State, replay: Shards) -> None:
        self.state, self.replay = state, replay
        self.learning = Learning(state, replay)
        self.serving = Serving(state, self.learning)
        self.evaluating = Evaluating(state)
        self.inserting = Inserting(state, replay)
        self.collecting = Collecting(state, self.inserting, self.evaluating)
        self.checkpoints = Checkpoints(state, self.learning, replay)

    def take_ready(self, timeout: float) -> None:
        """Take in whatever is ready, waiting at most `timeout` seconds for the first. Raises ActorLost."""
        self.state.watch.look()
        pending = [
            *self.collecting.pending(),
            *self.inserting.under_way,
            *self.learning.pending(),
            *self.checkpoints.pending(),
        ]
        if not pending:
            if self.checkpoints.saving is None:
                time.sleep(min(timeout, IDLE_SECONDS))
            self.checkpoints.wait(timeout)
            return
        ready = set(self._wait(pending, timeout))
        self.inserting.take(ready)
        self.learning.take(ready)
        self.checkpoints.take(ready)
        self.collecting.take(ready)

    @staticmethod
    def _wait(pending: list[Any], timeout: float) -> list[Any]:
        """Return what is ready, waiting for the first; of very many, for a few together, which costs less for each."""
        together = len(pending) // WAITED_TOGETHER
        if together > 1:
            found, _ = ray.wait(pending, num_returns=together, timeout=min(timeout, SHORT_SECONDS), fetch_local=False)
            if found:
                return list(found)
        found, _ = ray.wait(pending, num_returns=1, timeout=timeout, fetch_local=False)
        if found:
            found, _ = ray.wait(pending, num_returns=len(pending), timeout=0, fetch_local=False)
        return list(found)

    def settle(self, collects: bool = False) -> None:
        """Take in every update and insert under way, so that counters, learner and replay agree; with `collects`, the
        collects too, unless they take too long."""
        deadline, collecting, due = time.monotonic() + SETTLE_SECONDS, self.collecting, self._to_settle
        while due() or (collects and collecting.busy):
            self.take_ready(timeout=1.0)
            if collects and time.monotonic() > deadline and not due():
                self.state.run.recorder.counters["env_steps_discarded"] += collecting.budget.requested
                return

    def _to_settle(self) -> bool:
        return bool(self.learning.to_settle or self.inserting.under_way)

    def finish_evaluations(self) -> bool:
        """Have the evaluation that is due, or under way, played to its end; False if Ctrl-C came first."""
        while self.evaluating.pending:
            if self.evaluating.stop.requested:
                return False
            self.collecting.expect_somebody()
            self.collecting.begin_evaluation()
            self.take_ready(timeout=1.0)
        return True

    def begin_checkpoint(self) -> None:
        """Begin a checkpoint of the run as it is; it is written while the run goes on."""
        self.finish_checkpoint()
        self.settle()
        self.checkpoints.begin()

    def finish_checkpoint(self) -> None:
        """Take in whatever is ready until the checkpoint that is being written, if any, is complete."""
        while self.checkpoints.saving is not None:
            self.take_ready(timeout=1.0)

    def save(self) -> None:
        """Write a checkpoint of the run as it is, and wait for it."""
        self.finish_checkpoint()
        self.settle()
        self.checkpoints.begin(copy=False)
        while self.checkpoints.saving is not None:  # replay must not change meanwhile
            self.state.watch.look()
            self.checkpoints.wait(1.0)

    def save_what_was_accepted(self) -> None:
        """Write a checkpoint while another error is on its way; current collects may bring the same error again."""
        self.collecting.forget_tasks()
        self.save()

    def end(self) -> None:
        """End all actors of the run."""
        launcher, collecting = self.state.launcher, self.collecting
        self.serving.end()
        self.learning.ranks.end()
        for actor in [*self.replay.handles, *(c.handle for c in collecting.collectors)]:
            if actor is not None:
                launcher.end(actor)
        if collecting.own is not None:
            collecting.own.close()
