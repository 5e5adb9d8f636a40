"""The cost of a chunk for the driver: python -m benchmarks.coordinator [--actors 10 100 1000]

The coordinator's own parts (collecting, inserting, the rate limiter, the recorder) drive stub env actors: one process
plays all of them, and another plays replay. Nobody learns. The figure is the CPU time of the driver, all of its
threads, for each chunk, so that a busy machine does not matter; the rate of chunks is printed as well.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks.runtime import NEVER, preset
from distributed.collector import Collector
from distributed.coordinator import Coordinator
from worldloom.replay.buffer import Acceptance
from worldloom.replay.chunk import Chunk, ChunkInfo, ChunkKey
from worldloom.runs.config import CHUNKS_PER_SECOND, RunConfig


class StubEnvs:
    """Plays every env actor: a collect returns the same rows after a while."""

    def __init__(self, columns: dict[str, Any], steps: int, pause: float) -> None:
        self._columns, self._steps, self._pause = columns, steps, pause
        self._sequences: dict[int, int] = {}

    async def collect(self, actor: int) -> tuple[Chunk, ChunkInfo]:
        await asyncio.sleep(self._pause)
        sequence = self._sequences[actor] = self._sequences.get(actor, -1) + 1
        info = ChunkInfo(ChunkKey(actor, 0, sequence), self._steps, 1, (), (), 0, 0, "", self._pause, 0.0, "")
        return Chunk(self._columns, (self._steps,), info), info


class StubReplay:
    """Plays replay: counts what it is given."""

    def __init__(self) -> None:
        self._steps = self._chunks = 0

    def insert(self, chunk: Chunk) -> Acceptance:
        self._steps += chunk.info.steps
        self._chunks += 1
        return Acceptance(self._steps, self._steps, 0, self._chunks, 0, self._steps)


class StubHandle:
    """An env actor's handle, as far as the coordinator uses it while collecting."""

    def __init__(self, stub: Any, actor: int) -> None:
        self._stub, self._actor = stub, actor
        self.collect = self

    def options(self, **_: Any) -> StubHandle:
        return self

    def remote(self, *_: Any) -> Any:
        return self._stub.collect.options(num_returns=2).remote(self._actor)


def measure(config: RunConfig, actors: int, seconds: float) -> tuple[float, float]:
    """CPU milliseconds of the driver for each chunk, and chunks a second."""
    with tempfile.TemporaryDirectory() as folder:
        coordinator = Coordinator(config, Path(folder) / "run")
        parts = coordinator.parts
        try:
            coordinator.start(resume=False)
            steps = config.runtime.chunk_steps * config.env.num_envs
            rows = {"obs": np.zeros((steps, 3), np.float32)}
            pause = actors / CHUNKS_PER_SECOND
            stub = ray.remote(max_concurrency=actors, num_cpus=0)(StubEnvs).remote(rows, steps, pause)
            parts.replay.handles = [ray.remote(num_cpus=0)(StubReplay).remote()]
            parts.collecting.own = None
            parts.collecting.collectors = [
                Collector(actor, 0, StubHandle(stub, actor), None, node="stub", built=True) for actor in range(actors)
            ]
            for collector in parts.collecting.collectors:
                parts.collecting.free(collector)
            run_for(coordinator, 3.0 + pause)
            begun, before, chunks = time.monotonic(), time.process_time(), parts.replay.accepted[0].chunks
            run_for(coordinator, seconds)
            made = parts.replay.accepted[0].chunks - chunks
            return 1000 * (time.process_time() - before) / made, made / (time.monotonic() - begun)
        finally:
            parts.collecting.collectors = []  # there is nothing to end
            coordinator.run.recorder.close()
            coordinator.close()


def run_for(coordinator: Coordinator, seconds: float) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        coordinator.pace.advance(NEVER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--seconds", type=float, default=15.0)
    options = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home directory
    config = preset("--train.total_steps", str(10**9), "--train.learning_starts", str(10**8))
    config = replace(config, runtime=replace(config.runtime, env_actors=0), log=replace(config.log, interval=10**9))
    print("| env actors | driver CPU ms a chunk | chunks a second |\n|---|---|---|")
    for actors in options.actors:
        cost, rate = measure(config, actors, options.seconds)
        print(f"| {actors:,} | {cost:.2f} | {rate:.0f} |", flush=True)


if __name__ == "__main__":
    main()
