"""The coordinator in lockstep: the same actors in turn, bit for bit what the in-process trainer does."""

from __future__ import annotations

import ray

from distributed.collector import Collector
from distributed.coordinator import Coordinator
from worldloom.runs.interrupt import GracefulStop


class Lockstep(Coordinator):
    """One vector step of every env actor, taken in in their order, then every update that is due, then new weights."""

    updates_in_flight = 1

    def advance(self, stop: GracefulStop) -> None:
        if self.own is not None:
            self.collect_here()
        else:
            self._collect_in_order()
        while self.inserts:
            self.take_ready(timeout=1.0)
        learned = False
        while self.run.limiter.updates_due() and not stop.requested:
            self.dispatch_updates()
            while self.updates:
                self.take_ready(timeout=1.0)
            learned = True
        if learned:
            self.publish()

    def _collect_in_order(self) -> None:
        for collector in list(self.collectors):  # what a recovery left under way
            self._take(collector)
        steps = self.steps_to_collect()
        if not steps:
            return
        for collector in self.collectors:
            self.collect(collector, steps)
        for collector in list(self.collectors):
            self._take(collector)

    def _take(self, collector: Collector) -> None:
        """Wait for what is under way in it; an evaluation to its end."""
        while collector.task is not None and collector in self.collectors:
            ready, _ = ray.wait([collector.task], timeout=self.config.runtime.collect_timeout)
            if ready:
                self.take_collector(collector)
            else:
                self.recovery.replace(collector, f"gave no answer for {self.config.runtime.collect_timeout:g} s")

    def steps_to_collect(self) -> int:
        return min(super().steps_to_collect(), 1)

    def too_far_ahead(self) -> bool:
        return False

    def bundle(self) -> int:
        return 1

    def at_intervals(self) -> None:
        super().at_intervals()
        self.recovery.leave_draining_nodes()
        while self.evaluation_due is not None or self.evaluating is not None:
            self.expect_somebody()
            self.dispatch_evaluation()
            self.take_ready(timeout=1.0)

    def after_checkpoint(self) -> None:
        """Start all episodes anew, as a resumed run would."""
        self.recovery.restart_collecting()
