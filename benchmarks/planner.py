"""Plans per second of TD-MPC2: python -m benchmarks.planner --model tdmpc2:5m --envs 1,4,16

A plan is one `act`: encoding, the policy's sequences and every MPPI iteration, for all environments in one call. With
--reference DIR --reference-python PYTHON the authors' code, which plans for one environment, is timed in the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.learner import make_agent, reference_seconds
from worldloom.types import Agent

WARMUP = 3


def seconds_per_call(agent: Agent, envs: int, calls: int) -> list[float]:
    """Of `act` with a warm start, for `envs` environments."""
    rng, state, seconds = np.random.default_rng(0), None, []
    first = np.ones(envs, bool)
    for _ in range(WARMUP + calls):
        obs = rng.normal(size=(envs, *agent.world_model.obs_shape)).astype(np.float32)
        begun = time.perf_counter()
        _, state = agent.act(obs, state, first)  # actions arrive in numpy: nothing is left to wait for
        seconds.append(time.perf_counter() - begun)
        first = np.zeros(envs, bool)
    return seconds[WARMUP:]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.planner", description=__doc__)
    parser.add_argument("--model", default="tdmpc2:5m")
    parser.add_argument("--envs", default="1,4,16", help="numbers of environments, comma-separated")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--calls", type=int, default=15, help="timed calls each")
    parser.add_argument("--reference", type=Path, help="checkout of nicklashansen/tdmpc2 to time beside ours")
    parser.add_argument("--reference-python", default=sys.executable, help="a Python that has what it needs")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    agent = make_agent(options.model, "vector", 256, 4, options.device)
    found = {f"{envs} env{'s' if envs > 1 else ''}": (envs, seconds_per_call(agent, envs, options.calls))
             for envs in map(int, options.envs.split(","))}  # fmt: skip
    if options.reference:
        settings = {"batch": 256, "repeats": options.calls}
        found["reference"] = (1, reference_seconds(options, settings)["plan"])
    one = statistics.median(next(iter(found.values()))[1]) / next(iter(found.values()))[0]
    threads = f"{options.threads} threads of {os.cpu_count()} cores"
    print(f"{options.model}, {options.device}, {threads}, torch {torch.__version__}")
    print(f"{'':10}{'s/call':>9}{'best':>8}{'plans/s':>9}{'per env':>9}{'s/plan':>9}{'against the first':>19}")
    for name, (envs, seconds) in found.items():
        middle = statistics.median(seconds)
        rate = envs / middle
        print(
            f"{name:10}{middle:9.3f}{min(seconds):8.3f}{rate:9.2f}{1 / middle:9.2f}{1 / rate:9.3f}{one * rate:18.2f}x"
        )


if __name__ == "__main__":
    main()
