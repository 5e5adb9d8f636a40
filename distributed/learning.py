"""The learner as the coordinator sees it: updates under way, weights, pictures."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed.acting import batching
from distributed.actors.learner import LearnerActor
from distributed.launcher import ActorLost, result_of
from distributed.shards import Shards
from distributed.state import State
from worldloom.replay.chunk import row_bytes
from worldloom.report.pictures import PICTURE_ROWS
from worldloom.runs.build import AgentSpec, replay_columns

TASK_BYTES = 4 * 2**20  # the batches of one task together hold about this much


@dataclass
class Task:
    """Several updates under way at the learner."""

    result: Any  # references to what `LearnerActor.update` returns
    written: Any
    weights: Any
    updates: int
    shard: int  # that the batches came from


class Learning:
    """Keeps the learner supplied with batches, takes in its results, and publishes weights."""

    def __init__(self, state: State, replay: Shards) -> None:
        self._state, self._replay = state, replay
        self.learner: Any = None
        self.node = ""  # its id
        self.tasks: deque[Task] = deque()
        self._writes: list[Any] = []  # references to write-backs under way
        self._picture: Any = None  # a reference to the picture that is being drawn
        self._batch_bytes = 0  # once the learner is up

    def start(self) -> None:
        """Start the learner, and wait until it has built its agent; tasks of an earlier one are forgotten."""
        state = self._state
        state.watch.forget("learner")
        self.tasks.clear()
        self._picture = None
        threads = {"acting": batching(state.config).clients, "saving": 1, "control": 1}
        shares, start = state.shares, state.launcher.start
        # in any order, since the heartbeat must not wait for a batch that a frozen replay owes
        self.learner = start(
            LearnerActor, "learner", cpus=shares.cpus, gpus=shares.gpus, threads=threads, any_order=True
        )
        opened = self.learner.open.remote(state.config, state.env, shares.learner_threads, state.version)
        spec: AgentSpec = state.launcher.wait(opened, "the learner")
        state.spec, self.node = spec, state.launcher.wait(self.learner.node.remote(), "the learner")
        self._batch_bytes = spec.batch_size * spec.windows.length * row_bytes(replay_columns(state.env, spec))
        state.watch.follow("learner", self.learner, state.config.runtime.learner_timeout)

    def load(self, checkpoint: Path) -> int:
        """Restore the agent; return the number of updates that it has made."""
        updates: int = self._state.launcher.result(self.learner.load.remote(checkpoint), "learner")
        return updates

    def rescue(self, run_dir: Path) -> Path | None:
        """Have the learner save its agent alone; see `rescue_agent`."""
        folder: Path | None = self._state.launcher.result(self.learner.rescue.remote(run_dir), "learner")
        return folder

    def publish(self) -> None:
        """Have the learner publish its weights, for the next to act."""
        state = self._state
        state.weights = self.learner.publish.remote()
        state.version = state.launcher.result(state.weights, "the learner").version
        state.run.recorder.published(state.version)
        if state.own_server:
            state.launcher.result(state.server.load.remote(state.weights), "the acting server")

    def dispatch(self) -> None:
        """Keep the learner supplied with tasks, never with more updates than are due."""
        limits = self._state.limits
        while len(self.tasks) < limits.updates_in_flight:
            due = self._state.run.limiter.updates_due() - sum(task.updates for task in self.tasks)
            updates = min(due, self.updates_per_task())
            if updates <= 0:
                return
            batches, shard = self._replay.sample(updates)
            result, written, weights = self.learner.update.options(num_returns=3).remote(batches)
            self.tasks.append(Task(result, written, weights, updates, shard))

    def updates_per_task(self) -> int:
        """Updates in one task: several where batches are small, so that calls cost little compared with learning."""
        return max(1, min(self._state.limits.updates_per_task, TASK_BYTES // self.batch_bytes()))

    def batch_bytes(self) -> int:
        """Size of one batch of the learner."""
        return self._batch_bytes

    def pending(self) -> list[Any]:
        picture = [] if self._picture is None else [self._picture]
        return [*(task.result for task in self.tasks), *self._writes, *picture]

    @property
    def to_settle(self) -> bool:
        """True while updates, or the columns that they made, are under way."""
        return bool(self.tasks or self._writes)

    def take(self, ready: Collection[Any]) -> None:
        """Take in the tasks that are done, in their order. Raises ActorLost."""
        for reference in [write for write in self._writes if write in ready]:
            self._writes.remove(reference)
            result_of(reference, "replay")
        if self._picture is not None and self._picture in ready:
            picture, self._picture = self._picture, None
            self._state.run.recorder.picture(result_of(picture, "learner"))
        while self.tasks and self.tasks[0].result in ready:
            self.take_oldest()

    def abandon(self) -> None:
        """After a loss of replay: take in the tasks whose batches were drawn in time, and forget the others."""
        self._writes.clear()
        while self.tasks:
            try:
                self.take_oldest(write_back=False)
            except ActorLost:
                continue

    def take_oldest(self, write_back: bool = True) -> None:
        """Take in the oldest task. Raises ActorLost."""
        state, task = self._state, self.tasks.popleft()
        result = state.launcher.result(task.result, "learner")
        state.run.limiter.updates += result.updates
        state.run.recorder.updated(result.metrics, result.updates, result.seconds, result.publish_seconds)
        if result.published is not None:
            state.weights, state.version = task.weights, result.published
            state.run.recorder.published(state.version)
            if state.own_server:
                state.server.load.remote(state.weights)
        if state.spec.columns and write_back:
            self._writes.append(self._replay.write_back(task.shard, task.written))

    def draw_picture(self) -> None:
        """Have the learner draw what the world model imagines; the picture is recorded once it is there."""
        if self._picture is None:
            run = self._state.run
            sequence = self._replay.draw_sequence(PICTURE_ROWS, run.limiter.env_steps)
            self._picture = self.learner.picture.remote(sequence, run.title())

    def finish_picture(self) -> None:
        """Wait for the picture that is being drawn."""
        if self._picture is not None:
            self._state.launcher.result(self._picture, "learner")
            self.take([self._picture])
