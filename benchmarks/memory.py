"""Does a run's memory stay where it is once replay is full: python -m benchmarks.memory

TD-MPC2 on Pendulum-v1 through Ray, with a replay that is full after a fifth of the run and checkpoints all along.
Resident memory of every process is read at intervals from then on; the table gives the first and the last reading and
the largest of them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import ray

from benchmarks.runtime import preset
from distributed.coordinator import Coordinator
from worldloom.report.page import read_metrics


def resident(pid: int) -> float:
    """MiB of a process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


class Readings:
    """Of every process of a run, from `begin` environment steps on, at most one every `every` steps."""

    def __init__(self, coordinator: Coordinator, begin: int, every: int) -> None:
        self._run, self._next, self._every = coordinator.run, begin, every
        parts = coordinator.parts
        actors: dict[str, Any] = {"learner": parts.learning.learner, "replay/0": parts.replay.handles[0]}
        actors |= {collector.name: collector.handle for collector in parts.collecting.collectors}
        self._pids = {"coordinator": os.getpid(), **{n: ray.get(a.pid.remote()) for n, a in actors.items()}}
        self.values: dict[str, list[float]] = {name: [] for name in self._pids}
        advance = coordinator.pace.advance

        def advanced(stop: Any) -> None:
            advance(stop)
            self._read()

        coordinator.pace.advance = advanced  # type: ignore[method-assign]

    def _read(self) -> None:
        if self._run.limiter.env_steps >= self._next:
            self._next += self._every
            for name, pid in self._pids.items():
                self.values[name].append(resident(pid))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="environment steps with a full replay")
    parser.add_argument("--capacity", type=int, default=2_500, help="rows of replay")
    options = parser.parse_args()
    total = 2 * options.capacity + options.steps
    sizes = ["--replay.capacity", str(options.capacity), "--train.total_steps", str(total)]
    config = preset(*sizes, "--train.train_ratio", "64", "--checkpoint.interval", "1000", "--eval.interval", "2500")
    with tempfile.TemporaryDirectory() as folder:
        coordinator = Coordinator(config, Path(folder))
        try:
            coordinator.start(resume=False)
            readings = Readings(coordinator, 2 * options.capacity, options.steps // 20)
            coordinator.train()
        finally:
            coordinator.close()
        spilled = max(line.get("plasma/spilled_bytes", 0.0) for line in read_metrics(Path(folder)))
    values = {**readings.values, "all": [sum(each) for each in zip(*readings.values.values(), strict=True)]}
    print(f"\n{options.steps:,} steps with a full replay of {options.capacity:,} rows, {os.cpu_count()} cores")
    print("| process | MiB first | MiB last | MiB most | last against first |\n|---|---|---|---|---|")
    for name, found in values.items():
        print(f"| {name} | {found[0]:.1f} | {found[-1]:.1f} | {max(found):.1f} | {found[-1] / found[0] - 1:+.1%} |")
    print(f"\nspilled to disk: {spilled:,.0f} bytes")


if __name__ == "__main__":
    main()
