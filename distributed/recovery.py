"""Recovery: learner, replay and acting server are started again from the newest checkpoint, and losses are counted."""

from __future__ import annotations

import time
from pathlib import Path

from distributed.launcher import ActorLost, alive
from distributed.parts import Parts
from distributed.ray_internals import draining_nodes
from worldloom.manifest import checkpoint_folders, newest_checkpoint

RECOVERIES_ALLOWED = 5  # of learner, replay and acting server, without a checkpoint in between
DRAIN_SECONDS = 1.0  # between two looks at nodes that are about to go


class Recovery:
    """Starts dead parts again, and leaves nodes that are about to go; env actors are replaced by `Collecting`."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self._state = parts, parts.state
        self._count, self._committed = 0, 0  # recoveries since so many checkpoints were committed
        self._looked = 0.0
        self._saved_for: set[str] = set()  # nodes about to go, for which a checkpoint was taken

    def recover(self, lost: ActorLost) -> None:
        """Start again whatever died. Raises RuntimeError with the resume command where that happens again and again."""
        self._count_one(lost)
        with self._state.watch.deferring():
            self._start_again(lost)

    def _start_again(self, lost: ActorLost) -> None:
        parts, run = self._parts, self._state.run
        begun = time.monotonic()
        parts.checkpoints.settle()
        root = run.home.root
        checkpoint = newest_checkpoint(root) if checkpoint_folders(root) else None
        source = checkpoint.name if checkpoint else "the beginning"
        done = []
        if parts.learning.ranks.lost():
            done.append(self._learners(checkpoint, source))
        if dead := parts.replay.dead():
            discarded = self._replay(dead, checkpoint)
            names = ", ".join(parts.replay.name(shard) for shard in dead)
            done.append(f"{names} died; started again from {source}, {discarded} steps discarded")
            if parts.learning.ranks.broken:  # some learned from what others did not get any more
                done.append(self._learners(checkpoint, source))
        if self._state.own_server and not alive(self._state.server):
            parts.serving.restart()
            done.append("the acting server died; started again, all acting states are reset")
        run.recorder.counters["actor_restarts"] += len(done)
        run.recorder.say(
            f"{lost} {'; '.join(done) or 'Nothing had to be started again'} ({time.monotonic() - begun:.1f} s)"
        )

    def _count_one(self, lost: ActorLost) -> None:
        if self._parts.checkpoints.committed > self._committed:
            self._count, self._committed = 0, self._parts.checkpoints.committed
        self._count += 1
        if self._count > RECOVERIES_ALLOWED:
            raise RuntimeError(
                f"{lost} That was loss {self._count} of learner or replay since the last checkpoint, which is "
                f"intact; go on with: {self._state.run.resume_command()}"
            ) from lost

    def _learners(self, checkpoint: Path | None, source: str) -> str:
        """Start all again; return a sentence with the updates that are lost. They are not made up for: the limiter
        counts what was delivered."""
        learning, run = self._parts.learning, self._state.run
        served_there = self._state.server is not None and not self._state.own_server
        before = learning.ranks.size
        learning.ranks.end()
        learning.start()
        done = learning.load(checkpoint) if checkpoint else 0
        lost: int = run.limiter.updates - done - run.recorder.counters["updates_lost"]
        run.recorder.counters["updates_lost"] += lost
        if served_there:
            self._parts.serving.start()
        if self._state.server is None or served_there or alive(self._state.server):
            learning.publish()
        run.recorder.counters["learner_restarts"] += 1
        if before == 1:
            return f"learner died; started again from {source}, {lost} updates lost"
        return f"{before} learners ended; {learning.ranks.size} started again from {source}, {lost} updates lost"

    def _replay(self, dead: list[int], checkpoint: Path | None) -> int:
        """Start new episodes in the env actors of these shards, since the rows that open ones had are gone. Return
        the steps that were lost."""
        parts, run = self._parts, self._state.run
        parts.learning.abandon()
        # First, since what follows may fail half-way.
        parts.collecting.restart_episodes(lambda actor: parts.replay.shard_of(actor) in dead)
        lost = parts.inserting.discard(dead)
        for shard in dead:
            before = parts.replay.accepted[shard].steps
            run.recorder.rows_lost(parts.replay.restart(shard, parts.learning.ranks.nodes, checkpoint))
            gone = before - parts.replay.accepted[shard].steps
            run.recorder.counters["env_steps_discarded"] += gone
            lost += gone
            parts.replay.count(run.limiter)
        return lost

    def leave_draining_nodes(self) -> None:
        """Have env actors there hand over what they have and move; save once if learner or replay are there."""
        now = time.monotonic()
        if now - self._looked < DRAIN_SECONDS:
            return
        self._looked = now
        draining = draining_nodes()
        if not draining:
            return
        collecting = self._parts.collecting
        for collector in list(collecting.collectors):
            if not collector.leaving and collector.node in draining:
                collector.leaving = True
                collector.handle.interrupt.remote()
            if collector.leaving and collector.task is None:
                collecting.move(collector)
        if leaving := draining & {*self._parts.learning.ranks.nodes, *self._parts.replay.nodes} - self._saved_for:
            self._saved_for |= leaving
            self._state.run.recorder.say("a node of the learner or replay is about to go: saving")
            self._parts.checkpoints.due = True
