"""What died is started again, and what was lost is counted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.exceptions import GetTimeoutError

from distributed.launcher import DEATHS, ActorLost, alive, result_of
from worldloom.pretrained import newest_checkpoint

if TYPE_CHECKING:
    from distributed.collector import Collector
    from distributed.coordinator import Coordinator

RESTARTS_ALLOWED = 5  # of one env actor in a row, without a chunk in between
RECOVERIES_ALLOWED = 5  # of learner, replay and acting server, without a checkpoint in between
DRAIN_SECONDS = 1.0  # between two looks at nodes that are about to go


class Recovery:
    """Of one coordinator's actors: env actors anew with the newest weights, learner and replay from the newest
    checkpoint."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._c = coordinator
        self._count = 0  # since the last checkpoint
        self._looked = 0.0
        self._saved_for: set[str] = set()  # nodes about to go, for whose sake a checkpoint was taken

    def checkpointed(self) -> None:
        self._count = 0

    # Learner, replay and acting server

    def recover(self, lost: ActorLost) -> None:
        """Start again whatever died. Raises RuntimeError with the resume command where that happens again and again."""
        c, self._count = self._c, self._count + 1
        if self._count > RECOVERIES_ALLOWED:
            raise RuntimeError(
                f"{lost} That was loss {self._count} of learner or replay since the last checkpoint, which is "
                f"intact; go on with: {c.run.resume_command()}"
            ) from lost
        begun = time.monotonic()
        self._abandon_saving()
        saved = sorted(c.run.dir.resolve().glob("checkpoints/step-*/manifest.json"))
        checkpoint = newest_checkpoint(c.run.dir.resolve()) if saved else None
        source = checkpoint.name if checkpoint else "the beginning"
        told = []
        if not alive(c.learner):
            told.append(f"learner died; started again from {source}, {self._learner(checkpoint)} updates lost")
        if dead := c.replay.dead():
            discarded = self._replay(dead, checkpoint)
            names = ", ".join(c.replay.name(shard) for shard in dead)
            told.append(f"{names} died; started again from {source}, {discarded} steps discarded")
        if c.server is not None and c.server is not c.learner and not alive(c.server):
            self._server()
            told.append("the acting server died; started again, acting states begin anew")
        c.run.recorder.counters["actor_restarts"] += len(told)
        c.run.recorder.say(f"{'; '.join(told) or lost} ({time.monotonic() - begun:.1f} s)")

    def _abandon_saving(self) -> None:
        """A checkpoint that was being written: complete if all of it is, else as if it had never begun."""
        c = self._c
        if c.saving:
            saving, c.saving = c.saving, None
            saving.wait()
            try:
                with c.run.saving():
                    saving.commit(c.config.checkpoint.keep)
            except ActorLost:
                c.run.recorder.say("the checkpoint that was being written is lost with it")

    def _learner(self, checkpoint: Path | None) -> int:
        """Returns the updates that are lost. They are not made up for: the limiter counts what was delivered."""
        c, served_there = self._c, self._c.server is self._c.learner
        c.launcher.end(c.learner)
        c.updates.clear()
        c.start_learner()
        done = result_of(c.learner.load.remote(checkpoint), "learner") if checkpoint else 0
        counters = c.run.recorder.counters
        lost: int = c.run.limiter.updates - done - counters["updates_lost"]
        counters["updates_lost"] += lost
        if served_there:
            c.start_server()
        if c.server is None or served_there or alive(c.server):
            c.publish()
        return lost

    def _server(self) -> None:
        c = self._c
        c.launcher.end(c.server)
        c.start_server()
        c.publish()

    def _replay(self, dead: list[int], checkpoint: Path | None) -> int:
        """Every episode of these shards starts anew, since the rows that open ones had are gone. Returns the steps
        that were lost."""
        c = self._c
        while c.updates:  # those whose batches were drawn in time are done
            try:
                c.take_update(write_back=False)
            except ActorLost:
                continue
        self.restart_collecting(dead)  # first, since what follows may fail half-way
        lost = 0
        for reference, info in list(c.inserts.items()):
            if c.replay.shard_of(info.key.actor) in dead:
                del c.inserts[reference]
                lost += info.steps
        c.run.recorder.counters["env_steps_discarded"] += lost
        for shard in dead:
            held = c.replay.accepted[shard].steps
            rows = c.replay.restart(shard, c.learner_node, checkpoint)
            c.run.recorder.rows_lost(rows)
            c.run.recorder.counters["env_steps_discarded"] += held - c.replay.accepted[shard].steps
            lost += held - c.replay.accepted[shard].steps
            c.run.limiter.env_steps = c.replay.steps
        return lost

    def restart_collecting(self, shards: list[int] | None = None) -> None:
        """Start all episodes anew, in actors that live on; only those of these shards."""
        c = self._c
        c.incarnation += 1
        mine = [x for x in c.collectors if shards is None or c.replay.shard_of(x.index) in shards]
        if c.own is not None:
            c.own.restart(c.incarnation)
        for collector in mine:  # what is under way ends before the restart, and is not taken in
            if collector.evaluating:
                c.evaluation_due, c.evaluating = c.evaluating, None
            c.run.recorder.counters["env_steps_discarded"] += collector.requested
            collector.task, collector.chunk, collector.requested = None, None, 0
            restarted = collector.handle.restart.remote(c.incarnation)
            try:
                ray.get(restarted, timeout=c.config.runtime.collect_timeout)
            except (GetTimeoutError, *DEATHS) as error:
                self.replace(collector, f"could not start anew ({type(error).__name__})", error)
            else:
                collector.incarnation = c.incarnation

    # Env actors

    def replace(self, collector: Collector, why: str, error: Exception | None = None) -> None:
        """Start a lost env actor anew; it gets the newest weights before it acts."""
        c, counters = self._c, self._c.run.recorder.counters
        if collector.restarts >= RESTARTS_ALLOWED:
            raise RuntimeError(
                f"env/{collector.index:03d} was lost {RESTARTS_ALLOWED + 1} times in a row without finishing a "
                f"collect; the last time it {why}. Look for an environment that kills or blocks its process."
            ) from error
        counters["actor_restarts"] += 1
        counters["env_steps_discarded"] += collector.requested
        c.run.recorder.say(
            f"env/{collector.index:03d} {why}; started again, at most {collector.requested} steps discarded"
        )
        self._start_anew(collector, collector.restarts + 1)

    def _start_anew(self, collector: Collector, restarts: int) -> None:
        c = self._c
        c.launcher.end(collector.handle)
        if collector.evaluating:  # do that again
            c.evaluation_due, c.evaluating = c.evaluating, None
        c.incarnation += 1
        fresh = c.start_collector(collector.index)
        fresh.restarts = restarts
        c.collectors[collector.index] = fresh

    # Nodes that are about to go

    def leave_draining_nodes(self) -> None:
        """Have env actors there hand over what they have and move; save once if learner or replay are there."""
        now = time.monotonic()
        if now - self._looked < DRAIN_SECONDS:
            return
        self._looked = now
        draining = _draining_nodes()
        if not draining:
            return
        c = self._c
        for collector in list(c.collectors):
            if not collector.leaving and collector.node in draining:
                collector.leaving = True
                collector.handle.interrupt.remote()
            if collector.leaving and collector.task is None:
                c.run.recorder.say(f"env/{collector.index:03d} leaves a node that is about to go")
                self._start_anew(collector, 0)
        if leaving := draining & {c.learner_node, *c.replay.nodes} - self._saved_for:
            self._saved_for |= leaving
            c.run.recorder.say("a node of the learner or replay is about to go: saving")
            c.begin_saving()


def _draining_nodes() -> set[str]:
    """Ids of nodes that will go, by `ray drain-node` or a preemption notice."""
    from ray._private.state import state

    return set(state.get_draining_nodes())
