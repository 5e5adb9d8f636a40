"""The learner, or several, as the coordinator sees it: updates under way, weights, pictures."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distributed.actors.learner import UpdateResult
from distributed.launcher import ActorLost, ExchangeLost, WorkLost, result_of
from distributed.ranks import Ranks
from distributed.shards import Shards
from distributed.state import State
from worldloom.replay.chunk import row_bytes
from worldloom.report.pictures import PICTURE_ROWS
from worldloom.runs.build import replay_columns
from worldloom.types import Metrics

TASK_BYTES = 4 * 2**20  # the batches of one task together hold about this much
STRAGGLER_SECONDS = 5.0  # for the other learners to fail as one did, before all are started again


@dataclass
class Task:
    """Holds several updates under way at the learners. Of each: references to what `LearnerActor.update` returns."""

    results: Sequence[Any]
    written: Sequence[Any]
    weights: Sequence[Any]
    updates: int
    shard: int  # that the batches came from
    outcomes: dict[int, UpdateResult | Exception] = field(default_factory=dict)  # by rank, of those that are ready

    @property
    def waited_for(self) -> list[Any]:
        return [reference for rank, reference in enumerate(self.results) if rank not in self.outcomes]

    def missing(self, names: Sequence[str]) -> str:
        """Return the names of the learners whose results are not there."""
        return ", ".join(name for rank, name in enumerate(names) if rank not in self.outcomes)

    @property
    def failed(self) -> bool:
        return any(isinstance(outcome, Exception) for outcome in self.outcomes.values())

    def note(self, ready: Collection[Any], names: Sequence[str]) -> None:
        """Take in the results that are ready."""
        for rank, reference in enumerate(self.results):
            if rank not in self.outcomes and reference in ready:
                try:
                    self.outcomes[rank] = result_of(reference, names[rank])
                except Exception as error:
                    self.outcomes[rank] = error


class Learning:
    """Keeps the learners supplied with batches, takes in their results, and publishes weights."""

    def __init__(self, state: State, replay: Shards) -> None:
        self._state, self._replay = state, replay
        self.ranks = Ranks(state)
        self.tasks: deque[Task] = deque()
        self._writes: list[Any] = []  # references to write-backs under way
        self._picture: Any = None  # a reference to the picture that is being drawn
        self._batch_bytes = 0  # once the learner is up

    @property
    def learner(self) -> Any:
        """Return the learner that publishes weights and writes checkpoints: the only one, or rank 0 of several."""
        return self.ranks.handles[0]

    @property
    def node(self) -> str:
        """Return the id of that learner's node."""
        return self.ranks.nodes[0]

    def start(self) -> None:
        """Start the learners, and wait until they have built their agents; what earlier ones owed is forgotten."""
        state = self._state
        self.tasks.clear()
        self._writes.clear()  # the columns that a dead learner made may be gone: each would count as a loss of its own
        self._picture = None
        state.spec = spec = self.ranks.start()
        self._batch_bytes = spec.batch_size * spec.windows.length * row_bytes(replay_columns(state.env, spec))

    def load(self, checkpoint: Path) -> int:
        """Restore the agent; return the number of updates that it has made."""
        return self.ranks.load(checkpoint)

    def describe(self) -> str | None:
        """Return a sentence that says what several learners exchange; None of one alone."""
        spec, ranks = self._state.spec, self.ranks
        if ranks.size == 1:
            return None
        nodes, share = len(set(ranks.nodes)), spec.batch_size // ranks.size
        return (
            f"{ranks.size} learners on {nodes} node{'s'[: nodes > 1]}: each learns from {share} of {spec.batch_size} "
            f"windows, and every update adds up {4 * spec.parameters / 2**20:,.1f} MiB of gradients ({ranks.backend})"
        )

    def rescue(self, run_dir: Path) -> Path | None:
        """Have the learner save its agent alone; see `rescue_agent`."""
        folder: Path | None = self._state.launcher.result(self.learner.rescue.remote(run_dir), "learner")
        return folder

    def publish(self) -> None:
        """Have the learner publish its weights, for the next to act."""
        state = self._state
        state.weights = self.ranks.publish()
        state.version = state.launcher.result(state.weights, "the learner").version
        state.run.recorder.published(state.version)
        if state.own_server:
            state.launcher.result(state.server.load.remote(state.weights), "the acting server")

    def dispatch(self) -> None:
        """Keep the learners supplied with tasks, never with more updates than are due."""
        limits = self._state.limits
        while len(self.tasks) < limits.updates_in_flight:
            due = self._state.run.limiter.updates_due() - sum(task.updates for task in self.tasks)
            updates = min(due, self.updates_per_task())
            if updates <= 0:
                return
            shares, shard = self._replay.sample(updates, self.ranks.size)
            results, written, weights = zip(*self.ranks.update(shares), strict=True)
            self.tasks.append(Task(results, written, weights, updates, shard))

    def updates_per_task(self) -> int:
        """Updates in one task: several where batches are small, so that calls cost little compared with learning."""
        return max(1, min(self._state.limits.updates_per_task, TASK_BYTES // self.batch_bytes()))

    def batch_bytes(self) -> int:
        """Size of one batch of the learner."""
        return self._batch_bytes

    def pending(self) -> list[Any]:
        picture = [] if self._picture is None else [self._picture]
        return [*(result for task in self.tasks for result in task.waited_for), *self._writes, *picture]

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
        for task in self.tasks:
            task.note(ready, self.ranks.names)
        while self.tasks and (self.tasks[0].failed or not self.tasks[0].waited_for):
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
        results = self._results(task)
        result, seconds = results[0], max(each.seconds for each in results)
        state.run.limiter.updates += result.updates
        metrics = _means([each.metrics for each in results])
        state.run.recorder.updated(metrics, result.updates, seconds, result.publish_seconds)
        if result.published is not None:
            state.weights, state.version = task.weights[0], result.published
            state.run.recorder.published(state.version)
            if state.own_server:
                state.server.load.remote(state.weights)
        if state.spec.columns and write_back:
            self._writes += [self._replay.write_back(task.shard, written) for written in task.written]

    def _results(self, task: Task) -> list[UpdateResult]:
        """Wait for the results of all learners. Raises what one of them raised, or ActorLost; what leaves them at
        different updates breaks them as a gang."""
        ranks, launcher, broken = self.ranks, self._state.launcher, self.ranks.broken
        while left := task.waited_for:
            ranks.broken |= task.failed  # unless all of them fail alike; the wait can end in another part's loss
            seconds = STRAGGLER_SECONDS if task.failed else float("inf")
            if not (ready := launcher.first(left, task.missing(ranks.names), seconds)):
                break
            task.note(ready, ranks.names)
        errors = [outcome for outcome in task.outcomes.values() if isinstance(outcome, Exception)]
        if errors:
            alike = len(errors) == ranks.size and all(isinstance(error, WorkLost) for error in errors)
            ranks.broken = broken or not alike
            raise _cause(errors, task.missing(ranks.names))
        made = [task.outcomes[rank] for rank in range(len(task.results))]
        results = [outcome for outcome in made if isinstance(outcome, UpdateResult)]
        ranks.agree([result.receipt for result in results])
        return results

    def draw_picture(self) -> None:
        """Have the learner draw what the world model imagines; the picture is recorded once it is there."""
        if self._picture is None:
            run = self._state.run
            sequence = self._replay.draw_sequence(PICTURE_ROWS, run.limiter.env_steps)
            self._picture = self.ranks.picture(sequence, run.title())

    def finish_picture(self) -> None:
        """Wait for the picture that is being drawn."""
        if self._picture is not None:
            self._state.launcher.result(self._picture, "learner")
            self.take([self._picture])


def _cause(errors: Sequence[Exception], silent: str) -> Exception:
    """Return the error that others may follow from: a death, what an update raised, or else the first exchange that
    failed, with the names of the learners that were silent, if any."""
    order: dict[type[Exception], int] = {ActorLost: 0, ExchangeLost: 2, WorkLost: 3}
    error = min(errors, key=lambda each: order.get(type(each), 1))
    return ExchangeLost(f"{error} No result came from {silent}.") if silent and type(error) is ExchangeLost else error


def _means(found: Sequence[Metrics]) -> Metrics:
    """Return means over the learners, which all have the same metrics."""
    if len(found) == 1:
        return found[0]
    return {name: sum(each[name] for each in found) / len(found) for name in found[0]}
