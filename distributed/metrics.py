"""The run's metrics as gauges of Ray, for the dashboard and Prometheus."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ray.util.metrics import Gauge


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
