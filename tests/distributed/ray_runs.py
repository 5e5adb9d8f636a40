"""Whole runs on Ray for tests: their configurations, kills in the middle, and what must hold at the end."""

import dataclasses
import os
import signal

import numpy as np
import ray

from distributed.coordinator import Coordinator
from distributed.launcher import alive
from tests.run_configs import dreamer_config, tiny_config
from worldloom.files import read_msgpack
from worldloom.manifest import newest_checkpoint, read_manifest
from worldloom.replay.buffer import Acceptance
from worldloom.runs.config import CheckpointConfig, EnvConfig, ReplayConfig, RuntimeConfig, TrainConfig
from worldloom.runs.inline import InlineTrainer
from worldloom.runs.verify import verify


def ray_config(env="Counting", actors=1, **sections):
    parts = {
        "env": EnvConfig(id=f"tests.environments:{env}-v0", num_envs=2),
        "train": TrainConfig(total_steps=600, learning_starts=100, train_ratio=12),
        "runtime": RuntimeConfig(kind="ray", env_actors=actors, chunk_steps=8, publish_interval=5, learner_threads=1),
    }
    return tiny_config(**{**parts, **sections})


def slow_config(total_steps=700, **sections):
    steps = TrainConfig(total_steps=total_steps, learning_starts=100, train_ratio=12)
    return ray_config("SlowCounting", **{"train": steps, "checkpoint": CheckpointConfig(interval=300), **sections})


def matrix_config(family, actors, shards=1, steps=300, **runtime):
    chosen = RuntimeConfig(
        **{"env_actors": actors, "chunk_steps": 8, "publish_interval": 5, "learner_threads": 1, **runtime}
    )
    parts = {"runtime": chosen, "replay": ReplayConfig(capacity=3000, shards=shards)}
    parts["train"] = TrainConfig(total_steps=steps, learning_starts=100, train_ratio=12 if family == "tdmpc2" else 4)
    return ray_config(**parts) if family == "tdmpc2" else dreamer_config(**parts)


def run(config, run_dir, resume=False):
    """A whole run, and what replay had accepted at its end."""
    coordinator = Coordinator(config, run_dir)
    try:
        coordinator.start(resume)
        summary = coordinator.train()
        return summary, accepted(coordinator)
    finally:
        coordinator.close()


def accepted(coordinator):
    """Return what all shards of replay have accepted together."""
    shards = ray.get([handle.accepted.remote() for handle in coordinator.parts.replay.handles])
    return Acceptance(*(sum(counts) for counts in zip(*map(dataclasses.astuple, shards), strict=True)))


def handle_of(coordinator, name):
    parts = coordinator.parts
    return {"learner": parts.learning.learner, "replay": parts.replay.handles[0], "server": parts.state.server}[name]


def run_and_kill(config, run_dir, kills):
    """A whole run in which, at each number of steps, the process of an actor is killed, every actor once; its summary,
    and replay's counts at its end. No checkpoint is being written then, so that it is known which one is the newest."""
    coordinator = Coordinator(config, run_dir)
    advance, left = coordinator.pace.advance, []

    def advance_and_kill(stop):
        advance(stop)
        while left and coordinator.run.limiter.env_steps >= left[0][0] and coordinator.parts.checkpoints.saving is None:
            os.kill(left.pop(0)[1], signal.SIGKILL)

    coordinator.pace.advance = advance_and_kill
    try:
        coordinator.start(resume=False)
        left += [(steps, ray.get(handle_of(coordinator, name).pid.remote())) for steps, name in kills]
        summary = coordinator.train()
        assert not left
        return summary, accepted(coordinator)
    finally:
        coordinator.close()


def complete_each_checkpoint(made):
    """Have every checkpoint complete before the run goes on, so that none has to wait for the one before it."""
    begin = made.parts.begin_checkpoint

    def begin_and_finish():
        begin()
        made.parts.finish_checkpoint()

    made.parts.begin_checkpoint = begin_and_finish


def kill(handle):
    """And wait until it is known to be dead."""
    os.kill(ray.get(handle.pid.remote()), signal.SIGKILL)
    while alive(handle):
        pass


def finish(made, run_dir):
    """The run to its end, with all counts checked."""
    summary = made.train()
    check(summary, accepted(made), run_dir, made.config)
    return summary


def check(summary, accepted, run_dir, config):
    """Counts agree, and rows are contiguous with a seam at every start."""
    assert summary["status"] == "completed"
    assert config.train.total_steps <= summary["env_steps"] == accepted.steps
    assert accepted.duplicates == 0
    folder = newest_checkpoint(run_dir)
    made = read_msgpack(folder / "learner.msgpack")["updates"]
    assert made == summary["updates"] - summary["updates_lost"], (made, summary)
    assert verify(run_dir) == []
    manifest = read_manifest(folder)
    assert manifest["limiter"]["env_steps"] == summary["env_steps"]
    if config.replay.shards > 1:  # which the in-process trainer does not have
        return
    replay = InlineTrainer(config, run_dir, resume=True).replay
    batch = replay.draw(300)
    count = batch["obs"][..., 0]
    if not replay.windows.crosses_episodes:
        np.testing.assert_array_equal(np.diff(count, axis=1), 1)
    np.testing.assert_array_equal(batch["rewards"], 10 * count)
    np.testing.assert_array_equal(batch["is_first"], count == 0)
    np.testing.assert_array_equal(batch["terminated"], count == 7)


# Several learners


def several(learners=2, runtime=(), **sections):
    """A run of 700 steps, an update every two, with checkpoints at 300 and 600; runtime: more of its fields."""
    made = slow_config(**sections)
    chosen = {"learners": learners, "env_actors": 1, "receipt_interval": 10, **dict(runtime)}
    return dataclasses.replace(made, runtime=dataclasses.replace(made.runtime, **chosen))


def learners_of(made):
    return made.parts.learning.ranks.handles


def assert_equal_learners(made, updates):
    found = ray.get([handle.receipt.remote() for handle in learners_of(made)])
    assert all(receipt == found[0] for receipt in found)
    assert found[0].updates == updates
