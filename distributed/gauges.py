"""Figures that the actors and the object store know, for the metrics; nothing here is waited for."""

from __future__ import annotations

import threading
import time
from typing import Any

import ray
from ray.exceptions import RayError

from distributed.ray_internals import ObjectStoreStats
from distributed.saving import Checkpoints
from distributed.shards import Shards
from distributed.state import State

STORE_SECONDS = 5.0  # between two readings of the object store


class Gauges:
    """Asks at one log line, and records the answers that are there at the next."""

    def __init__(self, state: State, replay: Shards, checkpoints: Checkpoints) -> None:
        self._state, self._replay, self._checkpoints = state, replay, checkpoints
        self._asked: dict[str, Any] = {}  # references to gauges, by who was asked
        self._store = StoreReader()
        self._spilled = False

    def record(self) -> None:
        """Record what has been answered, and ask again; record the age of the newest checkpoint."""
        found = {**self._store.values, **self._answers(), "checkpoint/age_seconds": self._checkpoints.age}
        if found.get("plasma/spilled_bytes") and not self._spilled:
            self._spilled = True
            self._state.say(
                "warning: the object store is too small and spills to disk, which is slow. Start Ray with a larger "
                "object_store_memory, or lower agent.batch_size or runtime.chunk_steps."
            )
        self._state.run.recorder.gauges(found)
        self._ask()

    def _ask(self) -> None:
        for shard, handle in enumerate(self._replay.handles):
            if (name := self._replay.name(shard)) not in self._asked:
                self._asked[name] = handle.gauges.remote()
        if self._state.server is not None and "server" not in self._asked:
            self._asked["server"] = self._state.server.serving_gauges.remote()

    def _answers(self) -> dict[str, float]:
        """Return what was answered, by name; of several shards the largest value."""
        found: dict[str, float] = {}
        for who, reference in list(self._asked.items()):
            if not ray.wait([reference], timeout=0)[0]:
                continue
            del self._asked[who]
            try:
                answer: dict[str, float] = ray.get(reference)
            except RayError:  # of an actor that died, which is noticed elsewhere
                continue
            for name, value in answer.items():
                found[name] = max(value, found.get(name, value))
        return found

    def close(self) -> None:
        self._store.close()


class StoreReader:
    """Reads the object store in a thread of its own: a frozen worker of any node holds up the answer for a minute.

    values: by name: the share of the store in use, bytes put into it per second, and bytes that it spilled to disk
    (none in a run that fits its cluster); empty until there is an answer.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self._stats, self._closed = ObjectStoreStats(), threading.Event()
        threading.Thread(target=self._read_on, name="object store", daemon=True).start()

    def _read_on(self) -> None:
        last: tuple[float, int] | None = None  # when, and bytes created by then
        while not self._closed.wait(STORE_SECONDS if last else 0.0):
            stats, now = self._stats.read(), time.monotonic()
            if stats is None:
                self.values = {}
                last = last or (now, 0)
                continue
            then, before = last or (now, stats.cumulative_created_bytes)
            last = (now, stats.cumulative_created_bytes)
            self.values = {
                "plasma/used_fraction": stats.object_store_bytes_used / max(stats.object_store_bytes_avail, 1),
                "plasma/bytes_per_second": (stats.cumulative_created_bytes - before) / max(now - then, 1e-9),
                "plasma/spilled_bytes": float(stats.spilled_bytes_total),
            }

    def close(self) -> None:
        self._closed.set()
