"""A checkpoint of the whole run, put together from what learner and replay write each by itself."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import ray

from distributed.launcher import ActorLost, result_of
from distributed.learning import Learning
from distributed.ranks import Ranks
from distributed.shards import Shards
from distributed.state import State
from worldloom.runs.rows import SavedReplay
from worldloom.runs.run import Run

T = TypeVar("T")

SLOW_SECONDS = 60.0  # of writing, after which the user is told


def beside(work: Callable[[], T]) -> Future[T]:
    """Do this in a thread: a store that hangs holds up neither the coordinator's loop nor the end of the process."""
    future: Future[T] = Future()

    def do() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=do, name="checkpoint", daemon=True).start()
    return future


class Saving:
    """A checkpoint that is being written. Learner and replay copy what they hold, then go on. Of several learners the
    first writes, once all have told that their states are equal.

    copy: replay copies its new rows first and writes them while the run goes on; else nothing else may go on until they
    are written, which takes no second copy of them.
    """

    def __init__(self, run: Run, manifest: Mapping[str, Any], ranks: Ranks, replay: Shards, copy: bool) -> None:
        self._run, self._manifest = run, manifest
        self._ranks, self._learner, self._replay = ranks, ranks.handles[0], replay
        self._begun = time.monotonic()
        self.told = False  # the user knows that it takes long
        self.paused = 0.0  # seconds for which learning stood still
        taken = self._learner.snapshot.remote(), replay.snapshot() if copy else None
        self._receipts = [handle.receipt.remote() for handle in ranks.handles] if ranks.size > 1 else []
        self._stages = self._write(*taken)
        self._under_way: Future[Any] | list[Any] = next(self._stages)

    def _write(self, agent: Any, rows: list[Any] | None) -> Iterator[Future[Any] | list[Any]]:
        """Yield what must be ready before the next stage: what the store was asked, or references of Ray."""
        opened = beside(partial(self._run.open_checkpoint, self._manifest["limiter"]["env_steps"]))
        yield opened
        folder = opened.result()
        learner = self._learner.write.remote(folder, [agent])
        shards = self._replay.save(folder) if rows is None else self._replay.write(folder, rows)
        yield [learner, *shards, *self._receipts]
        try:
            committed = beside(partial(self._run.commit_checkpoint, folder, self._complete(learner, shards)))
            yield committed
            committed.result()
        except Exception:
            yield beside(partial(self._run.drop_checkpoint, folder))
            raise

    def _complete(self, learner: Any, shards: list[Any]) -> dict[str, Any]:
        """Return the manifest with all files. Raises what an actor raised, or ActorLost."""
        self.paused, files = result_of(learner, "learner")
        self._ranks.agree([result_of(*each) for each in zip(self._receipts, self._ranks.names, strict=False)])
        saved: list[SavedReplay] = [result_of(shard, "replay") for shard in shards]
        for shard in saved:
            files |= shard.files
        return {**self._manifest, "rows": [shard.rows for shard in saved], "files": files}

    def pending(self) -> list[Any]:
        """References that are not known to be ready."""
        return self._under_way if isinstance(self._under_way, list) else []

    def wait(self, seconds: float) -> Collection[Any]:
        """Wait for what is under way; return the references that are ready."""
        if isinstance(self._under_way, Future):
            concurrent.futures.wait([self._under_way], timeout=seconds)
            return []
        return ray.wait(self._under_way, num_returns=len(self._under_way), timeout=seconds, fetch_local=False)[0]

    def advance(self, ready: Collection[Any]) -> bool:
        """Begin the next stage if the one under way is over, these references being ready; return whether it was the
        last one. Raises OSError, LeaseLost, ActorLost, or what the learner raised: then nothing is left behind."""
        while True:
            if isinstance(self._under_way, list):
                self._under_way = [reference for reference in self._under_way if reference not in ready]
                if self._under_way:
                    return False
            elif not self._under_way.done():
                return False
            following = next(self._stages, None)
            if following is None:
                return True
            self._under_way = following

    @property
    def env_steps(self) -> int:
        return int(self._manifest["limiter"]["env_steps"])

    @property
    def seconds(self) -> float:
        """Time since it was begun."""
        return time.monotonic() - self._begun


class Checkpoints:
    """Writes the run's checkpoints, one at a time.

    due: one is to begin when the one that is being written, if any, is complete.
    """

    def __init__(self, state: State, learning: Learning, replay: Shards) -> None:
        self._state, self._learning, self._replay = state, learning, replay
        self.saving: Saving | None = None
        self.due = False
        self.committed = 0  # checkpoints of this process
        self._committed_at = time.monotonic()  # of the newest, or the start of this process

    @property
    def age(self) -> float:
        """Seconds since the newest checkpoint, or since the start: what a crash would cost."""
        return time.monotonic() - self._committed_at

    def begin(self, copy: bool = True) -> None:
        """Begin a checkpoint, see `Saving`; no update, insert or other checkpoint may be under way."""
        run = self._state.run
        manifest = {**run.manifest(self._state.incarnation), "replay": self._replay.state_dict()}
        self.due = False
        self.saving = Saving(run, manifest, self._learning.ranks, self._replay, copy)

    def pending(self) -> list[Any]:
        return self.saving.pending() if self.saving else []

    def take(self, ready: Collection[Any]) -> None:
        """Go on with the checkpoint that is being written. Raises LeaseLost, ActorLost, and OSError if it is to end the
        run."""
        if self.saving is None:
            return
        saving, self.saving = self.saving, None
        with self._state.run.saving():
            if saving.advance(ready):
                self._count(saving)
            else:
                self.saving = saving
                self._tell(saving)

    def wait(self, seconds: float) -> None:
        """Wait for the next stage of the checkpoint that is being written, and go on with it."""
        if self.saving is not None:
            self.take(self.saving.wait(seconds))

    def settle(self) -> None:
        """After a death: complete the checkpoint that was being written if all of it is there, else drop it."""
        try:
            while self.saving is not None:
                self.wait(1.0)
                self._state.launcher.between()
        except ActorLost:
            self._state.say("the checkpoint that was being written is lost with it")

    def _count(self, saving: Saving) -> None:
        self.committed, self._committed_at = self.committed + 1, time.monotonic()
        gauges = {"checkpoint/paused_seconds": saving.paused, "checkpoint/seconds": saving.seconds}
        self._state.run.recorder.gauges({**gauges, "checkpoint/age_seconds": self.age})

    def _tell(self, saving: Saving) -> None:
        if saving.seconds > SLOW_SECONDS and not saving.told:
            saving.told = True
            self._state.say(
                f"the checkpoint of step {saving.env_steps:,} is still being written after {saving.seconds:.0f} s; "
                f"the next one waits for it ({self._state.run.home.root})"
            )
