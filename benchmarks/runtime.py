"""What distribution costs and gives, a table a part: python -m benchmarks.runtime [--only updates sample actors …]

updates: updates per second of the Ray runtime over the in-process loop, both fed from a replay of the same recorded
Pendulum steps, in alternating rounds, and the share of the time that the learner learns. sample: how long a batch of
images takes from replay to a reader, against memcpy of the same bytes. actors: environment steps per second of 1, 2 and
4 env actors, nobody learning. publish: 48 MB of weights to 1 and 4 actors. acting: the same run with env actors that
act, a server in the learner and one of its own. Every figure is a median; start-up is not in it.
"""

from __future__ import annotations

import argparse
import os
import secrets
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from distributed.actors.replay import ReplayActor
from distributed.cluster import OBJECT_STORE_BYTES
from distributed.coordinator import Coordinator
from distributed.launcher import Launcher
from distributed.shards import THREADS
from launch.arguments import run_config, run_parser
from worldloom.acting.local import LocalActing
from worldloom.acting.rollout import Lane, Rollout
from worldloom.replay.buffer import ReplayBuffer
from worldloom.report.page import read_metrics
from worldloom.runs.build import agent_spec, make_replay, make_run_agent, make_run_env, probe_env
from worldloom.runs.config import RunConfig
from worldloom.types import Weights

PRESET = Path(__file__).resolve().parent.parent / "configs" / "tdmpc2_pendulum.yaml"
WARM = 60  # batches, until every page of the store has been touched
WEIGHTS_BYTES = 48 * 2**20


def preset(*overrides: str) -> RunConfig:
    parser = run_parser("benchmarks.runtime", "")
    return run_config(parser, parser.parse_args(["--config", str(PRESET), *overrides]))


def record(config: RunConfig, steps: int) -> list[Any]:
    """Chunks of random acting."""
    agent = make_run_agent(config, probe_env(config), "cpu", 0)
    lane = Lane(make_run_env(config.env, config.env.num_envs, 0), LocalActing(agent))
    rollout = Rollout([lane], seed=0)
    return [rollout.collect(64, random=True) for _ in range(steps // (64 * config.env.num_envs) + 1)]


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
        replay = self._coordinator.parts.replay
        for chunk in chunks:
            replay.take_acceptance(replay.insert(chunk, 0), 0)
        self._limiter = self._coordinator.run.limiter
        self._limiter.env_steps = replay.steps
        self._limiter.updates = self._limiter.updates_due()

    def updates_per_second(self, updates: int) -> tuple[float, float]:
        """The rate, and the share of the time that the learner spent learning."""
        self._limiter.updates -= updates
        busy = self._coordinator.run.recorder.busy_seconds
        begun = time.perf_counter()
        while self._limiter.updates_due():
            self._coordinator.parts.learning.dispatch()
            self._coordinator.parts.take_ready(timeout=1.0)
        seconds = time.perf_counter() - begun
        return updates / seconds, (self._coordinator.run.recorder.busy_seconds - busy) / seconds

    def close(self) -> None:
        self._coordinator.run.recorder.close()
        self._coordinator.close()


def updates(options: argparse.Namespace) -> None:
    threads = ["--runtime.env_actors", "0", "--runtime.learner_threads", str(options.threads)]
    config = preset(*threads, "--train.seed", str(options.seed))
    chunks = record(config, 5000)
    inline = InlineSide(config, chunks, options.threads)
    with tempfile.TemporaryDirectory() as run_dir:
        distributed = RaySide(config, chunks, Path(run_dir))
        rates: dict[str, list[float]] = {"inline": [], "ray": [], "busy": []}
        inline.updates_per_second(50)
        distributed.updates_per_second(50)
        for _ in range(options.rounds):
            rates["inline"].append(inline.updates_per_second(300))
            rate, busy = distributed.updates_per_second(300)
            rates["ray"].append(rate)
            rates["busy"].append(busy)
        distributed.close()
    middle = {name: statistics.median(values) for name, values in rates.items()}
    print(f"\nupdates: {PRESET.name}, {options.threads} learner thread(s), {options.rounds} rounds of 300")
    print(f"{'runtime':10}{'updates/s':>11}{'x inline':>10}{'learner busy':>14}")
    print(f"{'inline':10}{middle['inline']:11.1f}{1.0:10.2f}{'':>14}")
    print(f"{'ray':10}{middle['ray']:11.1f}{middle['ray'] / middle['inline']:10.2f}{middle['busy']:14.2f}")


def sample(options: argparse.Namespace) -> None:
    """DreamerV3's batches of images, 16 x 65 x 64 x 64 x 3, out of a full ring."""
    config = preset("--algorithm", "dreamerv3:size1m", "--agent", "{}", "--replay.capacity", "20_000")
    config = replace(config, env=replace(config.env, id="tests.environments:Screen-v0", action_repeat=1))
    env = probe_env(config)
    spec = agent_spec(make_run_agent(config, env, "cpu", 0))
    with tempfile.TemporaryDirectory() as folder:
        actor = Launcher("benchmark").start(ReplayActor, "replay/0", 0, threads=THREADS)
        ray.get(actor.open.remote(config, env, spec, Path(folder)))
        rng = np.random.default_rng(options.seed)
        for chunk in record(config, 20_000):
            chunk.columns["obs"][:] = rng.integers(0, 256, chunk.columns["obs"].shape, np.uint8)
            ray.get(actor.insert.remote(chunk))
        took: dict[str, list[float]] = {"memcpy": [], "sample": []}
        before: deque[dict[str, Any]] = deque(maxlen=8)  # batches of before, so that memcpy finds none in a cache
        for n in range(40 * options.rounds):
            begun = time.perf_counter()
            (batch,) = ray.get(actor.sample.remote(1))
            copied = {name: np.array(column) for name, column in batch.items()}
            took["sample"].append(time.perf_counter() - begun)
            before.append(copied)
            begun = time.perf_counter()
            for column in before[0].values():
                column.copy()
            took["memcpy"].append(time.perf_counter() - begun)
            if n == WARM:  # the store's pages are warm from here on
                took = {"memcpy": [], "sample": []}
        ray.kill(actor)
    size = sum(column.nbytes for column in copied.values())
    print(f"\nsample: {size / 1e6:.1f} MB, drawn in the replay actor, read and copied out of the store elsewhere")
    print(f"{'':10}{'p50 ms':>9}{'p95 ms':>9}{'x memcpy':>10}{'':>6}")
    base = [np.percentile(took["memcpy"], p) for p in (50, 95)]
    for name, values in took.items():
        p50, p95 = np.percentile(values, 50), np.percentile(values, 95)
        print(f"{name:10}{1000 * p50:9.2f}{1000 * p95:9.2f}{p50 / base[0]:10.1f}{p95 / base[1]:6.1f}")


def steps_per_second(config: RunConfig) -> float:
    """Environment steps per second of a run once all env actors are at work."""
    with tempfile.TemporaryDirectory() as run_dir:
        coordinator = Coordinator(config, Path(run_dir))
        coordinator.start(resume=False)
        limiter, collectors = coordinator.run.limiter, coordinator.parts.collecting.collectors
        step = partial(coordinator.pace.advance, NEVER)
        _for(step, until=lambda: all(c.built for c in collectors) and limiter.env_steps > 2000)
        begun, before = time.perf_counter(), limiter.env_steps
        _for(step, seconds=6.0)
        rate = (limiter.env_steps - before) / (time.perf_counter() - begun)
        coordinator.run.recorder.close()
        coordinator.close()
        return rate


def actors(options: argparse.Namespace) -> None:
    """DreamerV3's policy acts on Pendulum-v1; learning never starts."""
    rates: dict[int, list[float]] = {1: [], 2: [], 4: []}
    for _ in range(max(options.rounds // 2, 1)):
        for count, found in rates.items():
            given = ["--runtime.env_actors", str(count), "--runtime.chunk_steps", "64", "--env.action_repeat", "1"]
            config = preset("--algorithm", "dreamerv3:size1m", "--agent", "{}", *given)
            config = replace(config, train=replace(config.train, total_steps=10**9, learning_starts=10**8))
            found.append(steps_per_second(config))
    print("\nactors: dreamerv3:size1m acting on Pendulum-v1, 4 environments an actor, nobody learns")
    print(f"{'env actors':12}{'steps/s':>9}{'x one actor':>13}{'x one actor, times actors':>27}")
    one = statistics.median(rates[1])
    for count, found in rates.items():
        rate = statistics.median(found)
        print(f"{count:<12}{rate:9.0f}{rate / one:13.2f}{rate / one / count:27.2f}")


class Taker:
    """Takes weights as an env actor does."""

    def take(self, weights: Weights) -> float:
        return float(weights.flat[::1024].sum())  # of every page a number


class Publisher:
    """Gives weights as the learner does."""

    def publish(self) -> Weights:
        self._version = getattr(self, "_version", 0) + 1
        return Weights(self._version, np.full(WEIGHTS_BYTES // 4, self._version, np.float32))


def publish(options: argparse.Namespace) -> None:
    publisher = ray.remote(num_cpus=0)(Publisher).remote()
    takers = [ray.remote(num_cpus=0)(Taker).remote() for _ in range(4)]
    took: dict[int, list[float]] = {1: [], 4: []}
    for n in range(10 * options.rounds):
        for count, found in took.items():
            weights = publisher.publish.remote()
            ray.wait([weights], fetch_local=False)
            begun = time.perf_counter()
            ray.get([taker.take.remote(weights) for taker in takers[:count]])
            if n >= 5:
                found.append(time.perf_counter() - begun)
    for actor in (publisher, *takers):
        ray.kill(actor)
    print(f"\npublish: {WEIGHTS_BYTES / 2**20:.0f} MiB of weights, until every actor has read them")
    one = statistics.median(took[1])
    for count, found in took.items():
        middle = statistics.median(found)
        print(f"{count} actor(s): {1000 * middle:6.1f} ms, {middle / one:.2f}x of one")


def acting(options: argparse.Namespace) -> None:
    """A whole run of the preset each time; rates are those of its log lines after learning began."""
    ways = {
        "local": ["--runtime.acting", "local"],
        "server in the learner": ["--runtime.acting", "server", "--runtime.acting_server", "learner"],
        "server of its own": ["--runtime.acting", "server", "--runtime.acting_server", "actor"],
    }
    print(f"\nacting: {PRESET.name}, {options.steps:,} steps, 2 env actors x 4 environments; medians of log lines")
    print("".join([f"{'':24}", *(f"{name:>14}" for name in FIGURES)]))
    for name, given in ways.items():
        length = ["--train.total_steps", str(options.steps), "--eval.interval", "0"]
        config = preset("--runtime.env_actors", "2", *length, *given)
        with tempfile.TemporaryDirectory() as run_dir:
            coordinator = Coordinator(config, Path(run_dir))
            coordinator.start(resume=False)
            coordinator.train()
            coordinator.close()
            lines = [line for line in read_metrics(Path(run_dir)) if line.get("rate/updates_per_second")][1:-1]
        row = [statistics.median(line.get(key, float("nan")) for line in lines) for key in FIGURES.values()]
        row[-2] /= 1e6
        print("".join([f"{name:24}", *(f"{value:14.3g}" for value in row)]))


FIGURES = {
    "updates/s": "rate/updates_per_second",
    "env steps/s": "rate/env_steps_per_second",
    "busy": "rate/learner_busy_fraction",
    "stale p95": "weights/staleness_p95",
    "stale p95 s": "weights/staleness_seconds_p95",
    "publishing": "weights/publish_fraction",
    "batch fill": "acting/batch_fill",
    "store MB/s": "plasma/bytes_per_second",
    "spilled": "plasma/spilled_bytes",
}
NEVER: Any = None  # the stop that a free-running coordinator does not look at
PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "updates": updates,
    "sample": sample,
    "actors": actors,
    "publish": publish,
    "acting": acting,
}


def _for(step: Callable[[], None], seconds: float = float("inf"), until: Callable[[], bool] = lambda: False) -> None:
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds and not until():
        step()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.runtime", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions that medians are taken of")
    parser.add_argument("--steps", type=int, default=4000, help="of each run of the acting part")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of either learner")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home directory
    cores = os.cpu_count() or 1
    store = {"object_store_memory": OBJECT_STORE_BYTES}  # as a local run has it
    ray.init(address="local", num_cpus=max(cores, 4), include_dashboard=False, log_to_driver=False, **store)
    print(f"{cores} cores, torch {torch.__version__}, Ray {ray.__version__}, seed {options.seed}")
    for name in options.only:
        PARTS[name](options)
    ray.shutdown()


if __name__ == "__main__":
    main()
