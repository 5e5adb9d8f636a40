"""A checkpoint of the whole run, put together from what learner and replay write each by itself."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from distributed.launcher import result_of
from distributed.shards import Shards
from worldloom.runs.checkpoint import begin_checkpoint, commit_checkpoint, drop_partial


class Saving:
    """A checkpoint under way. Learner and replay copy what they hold after all that they were sent before, then go on.

    beside: replay copies its new rows first and writes them while the run goes on; else it waits until they are
    written, which takes no second copy of them. Raises OSError.
    """

    def __init__(self, run_dir: Path, manifest: Mapping[str, Any], learner: Any, replay: Shards, beside: bool) -> None:
        self._run_dir, self._manifest = run_dir, manifest
        self._partial = begin_checkpoint(run_dir, manifest["limiter"]["env_steps"])
        self._begun = time.monotonic()
        self._learner = learner.write.remote(self._partial, learner.snapshot.remote())
        self._shards = replay.snapshot(self._partial) if beside else replay.save(self._partial)
        self._open = [self._learner, *self._shards]

    def pending(self) -> list[Any]:
        """References that are not known to be ready."""
        return self._open

    def done(self, ready: Sequence[Any]) -> bool:
        """Whether, with these ready, nothing is pending any more."""
        self._open = [reference for reference in self._open if reference not in ready]
        return not self._open

    def wait(self) -> None:
        """Until `commit` can be called."""
        if self._open:
            ray.wait(self._open, num_returns=len(self._open))

    @property
    def seconds(self) -> float:
        """Since it was begun."""
        return time.monotonic() - self._begun

    def commit(self, keep: int) -> float:
        """Make it valid; returns the seconds that learning stood still. Raises OSError, ActorLost, or what the learner
        raised: then it leaves nothing behind."""
        try:
            paused: float = result_of(self._learner, "learner")
            rows = [result_of(names, "replay") for names in self._shards]
            commit_checkpoint(self._partial, {**self._manifest, "rows": rows}, keep)
            return paused
        except BaseException:
            drop_partial(self._run_dir)
            raise
