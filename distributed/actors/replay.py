"""The replay actor: one shard of the replay in a process of its own."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

import numpy as np
import ray

from distributed.actors.pulse import Process, timed
from worldloom.replay.buffer import Acceptance
from worldloom.replay.chunk import Chunk
from worldloom.runs.build import AgentSpec, EnvSpec, make_replay
from worldloom.runs.config import RunConfig
from worldloom.runs.rows import ReplayStore, SavedReplay
from worldloom.types import Array

RECENT_DRAWS = 1000

Batches = list[dict[str, Array]]
WrittenColumns = tuple[Array, dict[str, Array]]  # row numbers [B, T] and replay columns [B, T, ...]


class ReplayActor(Process):
    """Holds one shard of the replay; chunks are copied in, so that no shared memory stays pinned."""

    def __init__(self, shard: int) -> None:
        super().__init__()
        self._shard = shard

    def open(self, config: RunConfig, env: EnvSpec, spec: AgentSpec, run_dir: Path) -> str:
        """Allocate the buffer and return the id of this node.

        Not done in the constructor, whose errors lose their type on the way to the driver.
        """
        self._replay = make_replay(config, env, spec, self._shard)
        self._store = ReplayStore(run_dir, self._shard, config.replay.shards, config.checkpoint.compress)
        self._batch_size, self._exact = spec.batch_size, config.runtime.sync
        self._drawn: deque[float] = deque(maxlen=RECENT_DRAWS)
        return str(ray.get_runtime_context().get_node_id())

    def __repr__(self) -> str:
        return f"replay/{self._shard}"

    @timed
    def insert(self, chunk: Chunk) -> Acceptance:
        return self._replay.insert(chunk)

    def accepted(self) -> Acceptance:
        return self._replay.accepted()

    @timed
    def sample(self, batches: int) -> Batches:
        drawn: Batches = []
        for _ in range(batches):
            begun = time.monotonic()
            drawn.append(self._replay.draw(self._batch_size))
            self._drawn.append(time.monotonic() - begun)
        return drawn

    def sample_shares(self, batches: int, learners: int) -> list[Batches]:
        """Draw as `sample` does; return each learner's part of all batches, as `Gang.share` divides them."""
        drawn = self.sample(batches)
        size = self._batch_size // learners
        slices = [slice(rank * size, (rank + 1) * size) for rank in range(learners)]
        return [[{name: value[part] for name, value in batch.items()} for batch in drawn] for part in slices]

    def gauges(self) -> dict[str, float]:
        """Return how many seconds a draw took, over the last draws, and the share of the buffer in use."""
        seconds = {f"replay/sample_seconds_p{p}": float(np.percentile(self._drawn or [0.0], p)) for p in (50, 95)}
        return {**seconds, "replay/filled_fraction": len(self._replay) / self._replay.capacity}

    @timed
    def draw_sequence(self, rows: int, seed: int) -> dict[str, Array] | None:
        return self._replay.draw_sequence(rows, np.random.default_rng(seed))

    @timed
    def write_back(self, updated: list[WrittenColumns]) -> int:
        """Write fresh replay columns from the learner; return how many rows were already overwritten."""
        return sum(self._replay.write_back(rows, columns) for rows, columns in updated)

    @timed
    def snapshot(self) -> None:
        """Copy what a checkpoint needs."""
        self._snapshot = self._store.snapshot(self._replay, self._exact)

    @ray.method(concurrency_group="saving")
    def write(self, folder: Path, taken: None) -> SavedReplay:  # noqa: ARG002 - what it waits for
        """Write the snapshot while other calls go on."""
        try:
            return self._store.write(folder, self._snapshot)
        finally:
            del self._snapshot

    @timed
    def save(self, folder: Path) -> SavedReplay:
        """Write a checkpoint without a copy of the rows, while no other call runs."""
        return self._store.save(folder, self._replay, self._exact)

    @timed
    def load(self, folder: Path) -> tuple[Acceptance, int]:
        """Restore a checkpoint; return what it had accepted, and how many rows are lost with damaged files."""
        lost = self._store.load(folder, self._replay)
        return self._replay.accepted(), lost
