"""The way to run with runtime.sync: the same actors in turn, bit for bit what the in-process trainer does."""

from __future__ import annotations

import time

import ray

from distributed.collector import Collector
from distributed.parts import Parts
from distributed.recovery import Recovery
from distributed.state import Limits
from worldloom.interrupt import GracefulStop
from worldloom.runs.config import RunConfig


class Lockstep:
    """One vector step of every env actor, taken in in their order, then every update that is due, then new weights."""

    def __init__(self, parts: Parts, recovery: Recovery) -> None:
        self._parts, self._recovery = parts, recovery

    @staticmethod
    def limits(config: RunConfig) -> Limits:
        return Limits(updates_in_flight=1, updates_per_task=1, chunk_steps=1)

    def advance(self, stop: GracefulStop) -> None:
        """One turn of everybody."""
        parts = self._parts
        if parts.collecting.own is not None:
            parts.collecting.collect_here()
        else:
            self._collect_in_order()
        while parts.inserting.under_way:
            parts.take_ready(timeout=1.0)
        learned = False
        while parts.state.run.limiter.updates_due() and not stop.requested:
            parts.learning.dispatch()
            while parts.learning.tasks:
                parts.take_ready(timeout=1.0)
            learned = True
        if learned:
            parts.learning.publish()

    def _collect_in_order(self) -> None:
        collecting = self._parts.collecting
        while not all(collector.built for collector in collecting.collectors):
            collecting.expect_somebody()
            self._parts.take_ready(timeout=1.0)
        for collector in list(collecting.collectors):  # what a recovery left under way
            self._take(collector)
        steps = collecting.budget.steps()
        if not steps:
            return
        for collector in collecting.collectors:
            collecting.collect(collector, steps)
        for collector in list(collecting.collectors):
            self._take(collector)

    def _take(self, collector: Collector) -> None:
        """Wait for its task and take it in; an evaluation is played to its end."""
        collecting, state = self._parts.collecting, self._parts.state
        while collector.task is not None and collector in collecting.collectors:
            state.watch.look()
            ready, _ = ray.wait([collector.task], timeout=1.0)
            if ready:
                collecting.take_result(collector)
            elif time.monotonic() - collector.since > collector.patience(state):
                collecting.replace_silent(collector)

    def after_interval(self) -> None:
        """Have an evaluation that fell due played before anything else goes on."""
        self._recovery.leave_draining_nodes()
        self._parts.finish_evaluations()

    def after_checkpoint(self) -> None:
        """Start new episodes everywhere, as a resumed run would."""
        self._parts.collecting.restart_episodes()
