"""Metrics to and from Ray: the run's, as gauges for the dashboard and Prometheus, and those of the object store."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from ray.util.metrics import Gauge

from distributed.ray_internals import ObjectStoreStats


class RayGauges:
    """A gauge for each metric, prefixed ray_worldloom_, made at its first value; tags: run, role, index."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run, "role": "coordinator", "index": "0"}
        self._gauges: dict[str, Gauge] = {}

    def __call__(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if name not in self._gauges:
                known = "worldloom_" + re.sub(r"\W", "_", name)
                self._gauges[name] = Gauge(known, description=name, tag_keys=tuple(self._tags))
                self._gauges[name].set_default_tags(self._tags)
            self._gauges[name].set(value)


class ObjectStore:
    """Measures what the cluster's object store holds and moves."""

    def __init__(self) -> None:
        self._stats = ObjectStoreStats()
        self._last: tuple[float, int] | None = None  # when, and bytes created by then

    def gauges(self) -> dict[str, float]:
        """Return gauges by name: the share of the store in use, bytes put into it per second since the last call, and
        bytes that it spilled to disk (none in a run that fits its cluster). Empty where no node answers."""
        stats, now = self._stats.read(), time.monotonic()
        if stats is None:
            return {}
        then, before = self._last or (now, stats.cumulative_created_bytes)
        self._last = (now, stats.cumulative_created_bytes)
        return {
            "plasma/used_fraction": stats.object_store_bytes_used / max(stats.object_store_bytes_avail, 1),
            "plasma/bytes_per_second": (stats.cumulative_created_bytes - before) / max(now - then, 1e-9),
            "plasma/spilled_bytes": float(stats.spilled_bytes_total),
        }
