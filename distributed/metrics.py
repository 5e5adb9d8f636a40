"""The run's metrics as gauges of Ray, for the dashboard and Prometheus."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from ray.util.metrics import Gauge

LOGGED_AT = "logged_at"  # Unix time of the newest line; a run that hangs leaves it behind the clock


def gauge_name(metric: str) -> str:
    """Return the name in Prometheus of a metric of metrics.jsonl: ray_worldloom_rate_train_ratio."""
    return f"ray_{_known(metric)}"


def _known(metric: str) -> str:
    return "worldloom_" + re.sub(r"\W", "_", metric)  # Ray itself puts ray_ before it


class RayGauges:
    """A gauge for each number of a line of metrics.jsonl, made at its first value; tags: run, role, index.

    A word, such as limited_by, has one gauge for each value seen so far, with that value as a tag of the metric's name:
    1 for the value of now, 0 for the others.
    """

    def __init__(self, run: str) -> None:
        self._tags = {"run": run, "role": "coordinator", "index": "0"}
        self._gauges: dict[str, Gauge] = {}
        self._words: dict[str, dict[str, float]] = {}  # the gauges of each word, by its values

    def __call__(self, line: Mapping[str, float | str]) -> None:
        for name, value in {**line, LOGGED_AT: time.time()}.items():
            if isinstance(value, str):
                seen = self._words.setdefault(name, {})
                seen.update({**dict.fromkeys(seen, 0.0), value: 1.0})
                for word, now in seen.items():
                    self._gauge(name, name).set(now, {name: word})
            else:
                self._gauge(name).set(value)

    def _gauge(self, name: str, *tags: str) -> Gauge:
        if name not in self._gauges:
            self._gauges[name] = Gauge(_known(name), description=name, tag_keys=(*self._tags, *tags))
            self._gauges[name].set_default_tags(self._tags)
        return self._gauges[name]
