"""A run in which a random actor is killed every few seconds, beside the same run left alone: python -m benchmarks.kills

TD-MPC2 on Pendulum-v1 with the settings of configs/tdmpc2_pendulum.yaml, on a local Ray of its own. Victims are the
learner, the replay shards, the env actors and, with --acting server, the acting server, each as likely. At the end
the invariants are checked: I1 to I4 and I6 from the files (`worldloom.runs.verify`), I5 as versions came in, I7 by
looking for actors and processes that are left.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import secrets
import signal
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from distributed.coordinator import Coordinator
from launch.arguments import run_config, run_parser
from worldloom.replay.chunk import ChunkInfo
from worldloom.runs.config import RunConfig
from worldloom.runs.verify import verify

PRESET = Path(__file__).resolve().parent.parent / "configs" / "tdmpc2_pendulum.yaml"
GONE_SECONDS = 30.0  # for the last process to end


class Storm:
    """Kills actors of a running coordinator, and notes what it sees."""

    def __init__(self, coordinator: Coordinator, every: float, minutes: float, seed: int) -> None:
        self._coordinator, self._every, self._seconds = coordinator, every, 60 * minutes
        self._random = random.Random(seed)
        self._over = threading.Event()
        self.kills: collections.Counter[str] = collections.Counter()
        self.pids: set[int] = set()
        self.broken: list[str] = []
        self._versions: dict[int, tuple[int, int]] = {}  # by actor: incarnation and version
        self._watch_versions()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Storm:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        ends = time.monotonic() + self._seconds
        while not self._over.wait(self._every) and time.monotonic() < ends:
            parts = self._coordinator.parts
            victims = {"learner": parts.learning.learner}
            victims |= {parts.replay.name(shard): handle for shard, handle in enumerate(parts.replay.handles)}
            victims |= {collector.name: collector.handle for collector in parts.collecting.collectors}
            if parts.state.own_server:
                victims["acting server"] = parts.state.server
            name = self._random.choice(sorted(victims))
            if (pid := self._pid(victims[name])) is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self.kills[name] += 1

    def _pid(self, handle: Any) -> int | None:
        """None of an actor that is dead already, or not up yet."""
        try:
            pid: int = ray.get(handle.pid.remote(), timeout=self._every)
        except (RayError, GetTimeoutError):
            return None
        self.pids.add(pid)
        return pid

    def _watch_versions(self) -> None:
        """I5: within an incarnation the version of the weights that act never goes back."""
        recorder = self._coordinator.run.recorder
        record = recorder.chunk

        def watched(info: ChunkInfo, newest: int) -> None:
            if info.version is not None:
                now = (info.key.incarnation, info.version)
                if now < self._versions.get(info.key.actor, now):
                    self.broken.append(f"I5: actor {info.key.actor} acted with {now} after newer weights.")
                self._versions[info.key.actor] = now
            record(info, newest)

        recorder.chunk = watched  # type: ignore[method-assign]


def left_behind(pids: set[int], namespace: str) -> list[str]:
    """I7: names and processes that are still there after a while."""
    deadline = time.monotonic() + GONE_SECONDS
    while True:
        names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == namespace]
        alive = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        if not (names or alive) or time.monotonic() > deadline:
            return [f"I7: {names} and processes {alive} are left."] if names or alive else []
        time.sleep(0.2)


def run(config: RunConfig, folder: Path, storm: tuple[float, float, int] | None) -> tuple[dict[str, Any], Storm | None]:
    coordinator = Coordinator(config, folder)
    try:
        coordinator.start(resume=False)
        if storm is None:
            return coordinator.train(), None
        with Storm(coordinator, *storm) as raging:
            return coordinator.train(), raging
    finally:
        coordinator.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for which the storm rages")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two kills")
    parser.add_argument("--steps", type=int, default=20_000, help="environment steps of the run")
    parser.add_argument("--ratio", type=float, default=128.0, help="replayed steps per environment step")
    parser.add_argument("--acting", choices=["local", "server"], default="local")
    parser.add_argument("--shards", type=int, default=1, help="of replay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", action="store_true", help="without the undisturbed run")
    options = parser.parse_args()
    given = run_parser("benchmarks.kills", "")
    config = run_config(given, given.parse_args(["--config", str(PRESET)]))
    config = replace(
        config,
        train=replace(config.train, total_steps=options.steps, train_ratio=options.ratio, seed=options.seed),
        runtime=replace(config.runtime, env_actors=2, acting=options.acting, acting_server="actor"),
        replay=replace(config.replay, shards=options.shards),
        checkpoint=replace(config.checkpoint, interval=200, keep=2),
        eval=replace(config.eval, interval=0, episodes=30),
    )
    cores = os.cpu_count() or 1
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home directory
    ray.init(address="local", num_cpus=max(cores, 3), include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        calm = None if options.alone else run(config, Path(folder) / "calm", None)[0]
        storm, raged = run(config, Path(folder) / "storm", (options.every, options.minutes, options.seed))
        assert raged is not None
        broken = verify(Path(folder) / "storm") + raged.broken
        broken += left_behind(raged.pids, "worldloom-storm")
    ray.shutdown()
    kills = ", ".join(f"{name} {count}" for name, count in sorted(raged.kills.items()))
    print(f"\n{PRESET.name}, {options.steps:,} steps, ratio {options.ratio:g}, seed {options.seed}, {cores} cores")
    print(f"a kill every {options.every:g} s for at most {options.minutes:g} min: {raged.kills.total()} ({kills})\n")
    print("| run | return | minutes | restarts | steps discarded | updates | updates lost | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for name, s in [("calm", calm), ("storm", storm)]:
        if s is not None:
            print(
                f"| {name} | {s['eval_return_mean']:.1f} ± {s['eval_return_std']:.1f} | {s['wall_seconds'] / 60:.1f} | "
                f"{s['actor_restarts']} | {s['env_steps_discarded']:,} | {s['updates']:,} | {s['updates_lost']:,} | "
                f"{s['train_ratio_actual']:g} |"
            )
    print("\ninvariants I1 to I7: " + ("hold" if not broken else "; ".join(broken)))


if __name__ == "__main__":
    main()
