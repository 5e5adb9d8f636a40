"""A checkpoint of the whole run, put together from what learner and replay write each by itself."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Mapping
from typing import Any

from distributed.launcher import ActorLost, result_of
from distributed.learning import Learning
from distributed.shards import Shards
from distributed.state import State
from worldloom.runs.checkpoint import begin_checkpoint, commit_checkpoint, drop_partial
from worldloom.runs.home import Home
from worldloom.runs.rows import SavedReplay


class Saving:
    """A checkpoint that is being written. Learner and replay copy what they hold, then go on.

    copy: replay copies its new rows first and writes them while the run goes on; else it waits until they are written,
    which takes no second copy of them. Raises OSError.
    """

    def __init__(self, home: Home, manifest: Mapping[str, Any], learner: Any, replay: Shards, copy: bool) -> None:
        self._home, self._manifest = home, manifest
        self._folder = begin_checkpoint(home.root, manifest["limiter"]["env_steps"])
        self._begun = time.monotonic()
        self._learner = learner.write.remote(self._folder, learner.snapshot.remote())
        self._shards = replay.snapshot(self._folder) if copy else replay.save(self._folder)
        self._open = [self._learner, *self._shards]

    def pending(self) -> list[Any]:
        """References that are not known to be ready."""
        return self._open

    def done(self, ready: Collection[Any]) -> bool:
        """Return whether, with these ready, nothing is pending any more."""
        self._open = [reference for reference in self._open if reference not in ready]
        return not self._open

    @property
    def seconds(self) -> float:
        """Time since it was begun."""
        return time.monotonic() - self._begun

    def commit(self, keep: int) -> float:
        """Make it valid; return the seconds for which learning stood still.

        Raises OSError, LeaseLost, ActorLost, or what the learner raised: then it leaves nothing behind.
        """
        try:
            paused, files = result_of(self._learner, "learner")
            shards: list[SavedReplay] = [result_of(saved, "replay") for saved in self._shards]
            for shard in shards:
                files |= shard.files
            manifest = {**self._manifest, "rows": [shard.rows for shard in shards], "files": files}
            self._home.check()
            commit_checkpoint(self._folder, manifest, keep)
            return float(paused)
        except BaseException:
            with contextlib.suppress(OSError):
                drop_partial(self._home.root)
            raise


class Checkpoints:
    """Writes the run's checkpoints, one at a time."""

    def __init__(self, state: State, learning: Learning, replay: Shards) -> None:
        self._state, self._learning, self._replay = state, learning, replay
        self.saving: Saving | None = None
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
        with run.saving():
            self.saving = Saving(run.home, manifest, self._learning.learner, self._replay, copy)

    def pending(self) -> list[Any]:
        return self.saving.pending() if self.saving else []

    def take(self, ready: Collection[Any]) -> None:
        """Commit the checkpoint if it is written."""
        if self.saving and self.saving.done(ready):
            self._commit()

    def settle(self) -> None:
        """After a death: complete the checkpoint that was being written if all of it is there, else drop it."""
        try:
            if self.saving:
                for reference in self.saving.pending():
                    self._state.launcher.until_ready(reference, "learner or replay")
                self._commit()
        except ActorLost:
            self._state.run.recorder.say("the checkpoint that was being written is lost with it")

    def _commit(self) -> None:
        assert self.saving is not None
        saving, self.saving = self.saving, None
        with self._state.run.saving():
            paused = saving.commit(self._state.config.checkpoint.keep)
            gauges = {"checkpoint/paused_seconds": paused, "checkpoint/seconds": saving.seconds}
            self.committed, self._committed_at = self.committed + 1, time.monotonic()
            self._state.run.recorder.gauges({**gauges, "checkpoint/age_seconds": self.age})
