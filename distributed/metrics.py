"""Metrics to and from Ray: the run's as gauges that the dashboard and Prometheus read, and the object store's."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Protocol

import grpc  # type: ignore[import-untyped]
import ray
from ray._private import internal_api
from ray.util.metrics import Gauge


class RayGauges:
    """A gauge for each metric, prefixed ray_worldloom_, made when it is first told; tags: run, role, index."""

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
    """What the cluster's object store holds and moves."""

    def __init__(self) -> None:
        self._state = internal_api.get_state_from_address(ray.get_runtime_context().gcs_address)
        self._last = (time.monotonic(), self._stats().cumulative_created_bytes)

    def gauges(self) -> dict[str, float]:
        """By name: share of the store in use, bytes put into it per second since the last call, and bytes that it had
        to spill to disk, which a run sized for its cluster never does. Empty where no node answers."""
        try:
            stats, now = self._stats(), time.monotonic()
        except grpc.RpcError:  # of a node that is going
            return {}
        then, before = self._last
        self._last = (now, stats.cumulative_created_bytes)
        return {
            "plasma/used_fraction": stats.object_store_bytes_used / max(stats.object_store_bytes_avail, 1),
            "plasma/bytes_per_second": (stats.cumulative_created_bytes - before) / max(now - then, 1e-9),
            "plasma/spilled_bytes": float(stats.spilled_bytes_total),
        }

    def _stats(self) -> StoreStats:
        stats: StoreStats = internal_api.get_memory_info_reply(self._state).store_stats
        return stats


class StoreStats(Protocol):
    """Of all nodes together."""

    object_store_bytes_used: int
    object_store_bytes_avail: int
    cumulative_created_bytes: int
    spilled_bytes_total: int
