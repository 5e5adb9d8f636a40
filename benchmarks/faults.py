"""Kill and freeze parts of a small run, and time how soon each works again: python -m benchmarks.faults

A tiny TD-MPC2 on Pendulum-v1, on a local Ray of its own. Env actor, learner and replay are killed (SIGKILL) and frozen
(SIGSTOP). The time is taken until the part that was lost delivers again: a chunk of the new env actor, an update of the
new learner, a step accepted by the new replay. With --learners 2 each of them is lost alone, then all at once, and rank
0 in a checkpoint. A frozen part is replaced after 5 s here (runtime.silence_timeout and
collect_timeout; the defaults are 60 and 300 s). While an env actor is frozen, the other one should go on: the time is
taken until it collects at 80 % of its rate before, over one second. Learner and replay have no others: collecting waits
for them by the train ratio, and because chunks on their way are bounded. At the end the invariants are checked
(`worldloom.runs.verify`).
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray

from distributed.coordinator import Coordinator
from worldloom.replay.chunk import ChunkInfo
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
    runtime=RuntimeConfig(
        env_actors=2,
        chunk_steps=8,
        publish_interval=10,
        learner_threads=1,
        silence_timeout=5.0,
        collect_timeout=5.0,
    ),
    eval=EvalConfig(interval=0, episodes=1),
    checkpoint=CheckpointConfig(interval=500),
    log=LogConfig(interval=1_000),
)


@dataclass(frozen=True)
class Row:
    """One loss. others: seconds until the other collects at full rate, and its longest pause; None without another."""

    what: str
    step: int
    seconds: float
    others: tuple[float, float] | None = None


class Drill:
    """Kills and freezes parts of a running coordinator, one after the other, and times their return."""

    def __init__(self, coordinator: Coordinator, rounds: int, learners: int) -> None:
        self._coordinator, self._rounds, self._learners = coordinator, rounds, learners
        self._steps: Counter[int] = Counter()  # by env actor
        self._begin = coordinator.parts.inserting.begin
        coordinator.parts.inserting.begin = self._count
        self.rows: list[Row] = []
        self.done = threading.Event()

    def _count(self, chunk: Any, info: ChunkInfo) -> None:
        self._steps[info.key.actor] += info.steps
        self._begin(chunk, info)

    def run(self) -> None:
        c = self._coordinator
        while c.run.limiter.env_steps < 1_200:  # learning, and two checkpoints written
            time.sleep(0.05)
        for _ in range(self._rounds):
            for how in (signal.SIGKILL, signal.SIGSTOP):
                self._lose(how, "env actor", lambda: [c.parts.collecting.collectors[1].handle], self._actor_delivers)
                self._lose_learners(how)
                self._lose(how, "replay", lambda: [c.parts.replay.handles[0]], self._steps_grow)
        self.done.set()

    def _lose_learners(self, how: signal.Signals) -> None:
        ranks = self._coordinator.parts.learning.ranks
        if self._learners == 1:
            self._lose(how, "learner", lambda: ranks.handles, self._updates_grow)
            return
        for rank in range(self._learners):
            self._lose(how, f"learner/{rank}", lambda rank=rank: [ranks.handles[rank]], self._updates_grow)  # type: ignore[misc]
        self._lose(how, f"all {self._learners} learners", lambda: ranks.handles, self._updates_grow)
        self._lose(how, "learner/0 in a checkpoint", lambda: ranks.handles[:1], self._updates_grow, in_checkpoint=True)

    def _lose(
        self,
        how: signal.Signals,
        name: str,
        handles: Callable[[], Sequence[Any]],
        delivering: Callable[[], Callable[[], bool]],
        in_checkpoint: bool = False,
    ) -> None:
        recovered, restarts = delivering(), self._coordinator.run.recorder.counters
        before, at = restarts["actor_restarts"], self._steps_done()
        pids = ray.get([handle.pid.remote() for handle in handles()])
        frozen = how == signal.SIGSTOP
        rate = self._rate() if frozen else 0.0
        while in_checkpoint and self._coordinator.parts.checkpoints.saving is None:
            time.sleep(0.001)
        for pid in pids:
            os.kill(pid, how)
        begun, seen = time.monotonic(), []
        while restarts["actor_restarts"] == before or not recovered():
            seen.append((time.monotonic() - begun, self._steps[0]))
            time.sleep(0.02)
        others = (time_to_full_rate(seen, rate), longest_pause(seen)) if name == "env actor" and frozen else None
        self.rows.append(Row(f"{name} {'frozen' if frozen else 'killed'}", at, time.monotonic() - begun, others))
        settled = self._steps_done() + 600  # a checkpoint further
        while self._steps_done() < settled:
            time.sleep(0.05)

    def _steps_done(self) -> int:
        return self._coordinator.run.limiter.env_steps

    def _rate(self) -> float:
        """Return the steps a second of env actor 0, over the next three."""
        before = self._steps[0]
        time.sleep(3.0)
        return (self._steps[0] - before) / 3.0

    def _actor_delivers(self) -> Callable[[], bool]:
        return self._new_env_actor_delivers(1)

    def _updates_grow(self) -> Callable[[], bool]:
        return self._grows(lambda: self._coordinator.run.limiter.updates)

    def _steps_grow(self) -> Callable[[], bool]:
        return self._grows(self._steps_done)

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


def time_to_full_rate(seen: list[tuple[float, int]], rate: float) -> float:
    """Return when a second begins in which the count grows by 80 % of `rate`, of (seconds, count) in order."""
    for begun, count in seen:
        later = next((n for at, n in seen if at >= begun + 1.0), None)
        if later is not None and later - count >= 0.8 * rate:
            return begun
    return float("inf")


def longest_pause(seen: list[tuple[float, int]]) -> float:
    """Return the longest time without growth of the count, of (seconds, count) in order."""
    grown = [0.0, *(at for (at, n), (_, before) in zip(seen[1:], seen, strict=False) if n > before), seen[-1][0]]
    return max(later - earlier for earlier, later in pairwise(grown))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="kills and freezes of each part")
    parser.add_argument("--learners", type=int, default=1, help="runtime.learners")
    options = parser.parse_args()
    rounds, learners = options.rounds, options.learners
    losses = 8_000 if learners == 1 else 12_000 + 4_000 * learners
    config = replace(CONFIG, train=replace(CONFIG.train, total_steps=4_000 + losses * rounds))
    config = replace(config, runtime=replace(config.runtime, learners=learners))
    with tempfile.TemporaryDirectory() as folder:
        coordinator = Coordinator(config, Path(folder) / "drill")
        try:
            coordinator.start(resume=False)
            drill = Drill(coordinator, rounds, learners)
            threading.Thread(target=drill.run, daemon=True).start()
            summary = coordinator.train()
        finally:
            coordinator.close()
        broken = verify(Path(folder) / "drill")
    print(
        "\n| lost | at step | seconds until it delivers again | until the other is at full rate | its longest pause |"
    )
    print("|---|---|---|---|---|")
    for row in drill.rows:
        others = " | ".join(["", ""] if row.others is None else [f"{each:.1f}" for each in row.others])
        print(f"| {row.what} | {row.step:,} | {row.seconds:.1f} | {others} |")
    counted = ("env_steps", "updates", "actor_restarts", "learner_restarts", "env_steps_discarded", "updates_lost")
    print("\n" + ", ".join(f"{name} {summary[name]:,}" for name in counted))
    print("all losses made" if drill.done.is_set() else "the run ended before all losses were made")
    print("invariants: " + ("hold" if not broken else "; ".join(broken)))


if __name__ == "__main__":
    main()
