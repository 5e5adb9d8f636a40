"""Kill env actor, learner and replay of a small run, and time how soon each works again: python -m benchmarks.faults

A tiny TD-MPC2 on Pendulum-v1, on a local Ray of its own. After each kill the time is taken until the part that was lost
delivers again: a chunk of the new env actor, an update of the new learner, a step accepted by the new replay. At the
end the invariants are checked (`worldloom.runs.verify`).
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ray

from distributed.coordinator import Coordinator
from worldloom.runs.config import (
    CheckpointConfig,
    EnvConfig,
    EvalConfig,
    LogConfig,
    ReplayConfig,
    RunConfig,
    RuntimeConfig,
    TrainConfig,
)
from worldloom.runs.verify import verify

CONFIG = RunConfig(
    algorithm="tdmpc2:1m",
    agent={"encoder_dim": 32, "mlp_dim": 32, "latent_dim": 32, "batch_size": 32, "num_samples": 32, "num_elites": 8},
    env=EnvConfig(id="Pendulum-v1", num_envs=2, action_repeat=2),
    replay=ReplayConfig(capacity=50_000),
    train=TrainConfig(learning_starts=200, train_ratio=48),
    runtime=RuntimeConfig(env_actors=2, chunk_steps=8, publish_interval=10, learner_threads=1),
    eval=EvalConfig(interval=0, episodes=1),
    checkpoint=CheckpointConfig(interval=500),
    log=LogConfig(interval=1_000),
)


class Drill:
    """Kills parts of a running coordinator, one after the other, and times their return."""

    def __init__(self, coordinator: Coordinator, rounds: int) -> None:
        self._coordinator, self._rounds = coordinator, rounds
        self.rows: list[tuple[str, int, float]] = []
        self.done = threading.Event()

    def run(self) -> None:
        c = self._coordinator
        while c.run.limiter.env_steps < 1_200:  # learning, and two checkpoints written
            time.sleep(0.05)
        for _ in range(self._rounds):
            self._kill("env actor", c.parts.collecting.collectors[1].handle, self._new_env_actor_delivers(1))
            self._kill("learner", c.parts.learning.learner, self._grows(lambda: c.run.limiter.updates))
            self._kill("replay", c.parts.replay.handles[0], self._grows(lambda: c.run.limiter.env_steps))
        self.done.set()

    def _kill(self, name: str, handle: object, recovered: Callable[[], bool]) -> None:
        restarts = self._coordinator.run.recorder.counters
        before, at = restarts["actor_restarts"], self._coordinator.run.limiter.env_steps
        os.kill(ray.get(handle.pid.remote()), signal.SIGKILL)  # type: ignore[attr-defined]
        begun = time.monotonic()
        while restarts["actor_restarts"] == before or not recovered():
            time.sleep(0.02)
        self.rows.append((name, at, time.monotonic() - begun))
        settled = self._coordinator.run.limiter.env_steps + 600  # a checkpoint further
        while self._coordinator.run.limiter.env_steps < settled:
            time.sleep(0.05)

    def _new_env_actor_delivers(self, index: int) -> Callable[[], bool]:
        old = self._coordinator.parts.collecting.collectors[index].incarnation

        def delivered() -> bool:
            collector = self._coordinator.parts.collecting.collectors[index]
            return collector.incarnation != old and collector.restarts == 0

        return delivered

    def _grows(self, count: Callable[[], int]) -> Callable[[], bool]:
        """Beyond what it is when the restart has been counted."""
        base: list[int] = []

        def grown() -> bool:
            base.append(count())
            return base[-1] > base[0]

        return grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="kills of each part")
    rounds = parser.parse_args().rounds
    config = replace(CONFIG, train=replace(CONFIG.train, total_steps=4_000 + 3_000 * rounds))
    with tempfile.TemporaryDirectory() as folder:
        coordinator = Coordinator(config, Path(folder) / "drill")
        try:
            coordinator.start(resume=False)
            drill = Drill(coordinator, rounds)
            threading.Thread(target=drill.run, daemon=True).start()
            summary = coordinator.train()
        finally:
            coordinator.close()
        broken = verify(Path(folder) / "drill")
    print("\n| killed | at step | seconds until it delivers again |\n|---|---|---|")
    for name, step, seconds in drill.rows:
        print(f"| {name} | {step:,} | {seconds:.1f} |")
    counted = ("env_steps", "updates", "actor_restarts", "env_steps_discarded", "updates_lost")
    print("\n" + ", ".join(f"{name} {summary[name]:,}" for name in counted))
    print("all kills made" if drill.done.is_set() else "the run ended before all kills were made")
    print("invariants: " + ("hold" if not broken else "; ".join(broken)))


if __name__ == "__main__":
    main()
