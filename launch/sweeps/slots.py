"""The number of runs of a sweep that run at once, and the share of the cluster that each gets."""

from __future__ import annotations

import math
from dataclasses import dataclass

RUNS_PER_GPU = 4  # at most, where their number is chosen here


@dataclass(frozen=True)
class Slots:
    """Holds how many runs run at once, and what each of them gets."""

    parallel: int
    cpus: float
    gpus: float
    threads: int

    def describe(self) -> str:
        gpus = f" and {self.gpus:.3g} GPU" if self.gpus else ""
        return f"{self.parallel} at a time, each with {self.cpus:.3g} CPU{gpus}"


def slots(parallel: int | None, runs: int, cpus: float, gpus: float) -> Slots:
    """Divide `cpus` and `gpus` among runs; parallel: None takes a CPU for each run, and at most 4 runs for a GPU.

    A run gets a whole CPU or, if there are more runs than CPUs, a share; runs share GPUs evenly.
    """
    most = max(int(cpus), 1)
    if gpus:
        most = min(most, RUNS_PER_GPU * max(int(gpus), 1))
    number = min(parallel or most, runs)
    share = min(math.floor(100 * cpus / number) / 100, 1.0)
    return Slots(number, share, 1 / math.ceil(number / gpus) if gpus else 0.0, max(int(cpus / number), 1))
