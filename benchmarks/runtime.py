"""Updates per second of the Ray runtime against the inline trainer, fed alike: python -m benchmarks.runtime

Both learn from a replay holding the same recorded Pendulum steps, with the same agent, batch and thread count. The
inline side samples and updates in turn; the Ray side has the coordinator's pipeline: a replay actor, a learner actor,
bundles of batches, weights published. Rounds of the two alternate; medians are compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from distributed.coordinator import Coordinator
from launch.arguments import run_config, run_parser
from worldloom.training.acting import LocalActing
from worldloom.training.assembly import agent_spec, make_replay, make_run_agent, make_run_env, probe_env
from worldloom.training.config import RunConfig
from worldloom.training.replay import ReplayBuffer
from worldloom.training.rollout import Lane, Rollout

PRESET = Path(__file__).resolve().parent.parent / "configs" / "tdmpc2_pendulum.yaml"


class InlineSide:
    """Sample, update, repeat, in this process."""

    def __init__(self, config: RunConfig, chunks: list[Any], threads: int) -> None:
        torch.set_num_threads(threads)
        env = probe_env(config)
        self._agent = make_run_agent(config, env, "cpu", config.train.seed)
        self._replay: ReplayBuffer = make_replay(config, env, agent_spec(self._agent))
        for chunk in chunks:
            self._replay.insert(chunk)

    def updates_per_second(self, updates: int) -> float:
        begun = time.perf_counter()
        for _ in range(updates):
            self._agent.update(self._replay.sample(self._agent.batch_size))
        return updates / (time.perf_counter() - begun)


class RaySide:
    """The coordinator's own pipeline, told that exactly so many updates are due."""

    def __init__(self, config: RunConfig, chunks: list[Any], run_dir: Path) -> None:
        self._coordinator = Coordinator(config, run_dir)
        self._coordinator.start(resume=False)
        for chunk in chunks:
            replay = self._coordinator.replay
            replay.take_acceptance(replay.insert(chunk, 0), 0)
        self._limiter = self._coordinator.run.limiter
        self._limiter.env_steps = self._coordinator.replay.steps
        self._limiter.updates = self._limiter.updates_due()

    def updates_per_second(self, updates: int) -> tuple[float, float]:
        """The rate, and the share of the time that the learner spent learning."""
        self._limiter.updates -= updates
        busy = self._coordinator.run.recorder.busy_seconds
        begun = time.perf_counter()
        while self._limiter.updates_due():
            self._coordinator.dispatch_updates()
            self._coordinator.take_ready(timeout=1.0)
        seconds = time.perf_counter() - begun
        return updates / seconds, (self._coordinator.run.recorder.busy_seconds - busy) / seconds

    def close(self) -> None:
        self._coordinator.run.recorder.close()
        self._coordinator.close()


def record(config: RunConfig, steps: int) -> list[Any]:
    """Chunks of random acting."""
    env = probe_env(config)
    agent = make_run_agent(config, env, "cpu", 0)
    rollout = Rollout([Lane(make_run_env(config.env, config.env.num_envs, 0), LocalActing(agent))], seed=0)
    return [rollout.collect(64, random=True) for _ in range(steps // (64 * config.env.num_envs) + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.runtime", description=__doc__)
    parser.add_argument("--updates", type=int, default=300, help="updates a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of either learner")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    arguments = run_parser("benchmarks.runtime", "")
    given = ["--config", str(PRESET), "--runtime.env_actors", "0", "--runtime.learner_threads", str(options.threads)]
    config = run_config(arguments, arguments.parse_args([*given, "--train.seed", str(options.seed)]))
    chunks = record(config, 5000)
    inline = InlineSide(config, chunks, options.threads)
    with tempfile.TemporaryDirectory() as run_dir:
        distributed = RaySide(config, chunks, Path(run_dir))
        rates: dict[str, list[float]] = {"inline": [], "ray": [], "busy": []}
        inline.updates_per_second(50)
        distributed.updates_per_second(50)
        for _ in range(options.rounds):
            rates["inline"].append(inline.updates_per_second(options.updates))
            rate, busy = distributed.updates_per_second(options.updates)
            rates["ray"].append(rate)
            rates["busy"].append(busy)
        distributed.close()
    middle = {name: statistics.median(values) for name, values in rates.items()}
    print(f"\n{PRESET.name}: {os.cpu_count()} cores, {options.threads} learner thread(s), seed {options.seed}")
    print(f"medians of {options.rounds} rounds of {options.updates} updates, inline and Ray in turn")
    print(f"{'runtime':10}{'updates/s':>11}{'x inline':>10}{'learner busy':>14}")
    print(f"{'inline':10}{middle['inline']:11.1f}{1.0:10.2f}{'':>14}")
    print(f"{'ray':10}{middle['ray']:11.1f}{middle['ray'] / middle['inline']:10.2f}{middle['busy']:14.2f}")


if __name__ == "__main__":
    main()
