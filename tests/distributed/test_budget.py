"""How long collects are, so that the coordinator is not flooded with chunks."""

import time

from distributed.budget import ChunkSize
from worldloom.runs.config import RuntimeConfig


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_collects_become_longer_where_chunks_would_flood_the_coordinator(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    size, rows_per_second, seen = ChunkSize(64, 200), 64 * 5000, []
    for _ in range(10):
        chunks = rows_per_second // size.steps()
        for _ in range(chunks):
            size.count()
        clock.now += 1.0
        seen.append(chunks)
    assert seen[0] == 5000
    assert max(seen[2:]) <= 200
    for _ in range(3):  # learning holds it up
        clock.now += 1.0
        size.count()
        steps = size.steps()
    assert steps == 64


def test_lockstep_never_collects_more_than_it_asks_for(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    size = ChunkSize(1, float("inf"))
    for _ in range(1000):
        size.count()
    clock.now += 1.0
    assert size.steps() == 1


def test_the_longest_time_of_a_collect_grows_with_the_actors():
    assert RuntimeConfig(env_actors=8).collect_seconds == 1.0
    assert RuntimeConfig(env_actors=1000).collect_seconds == 5.0
