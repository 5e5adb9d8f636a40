"""Faults of learner and replay: what dies is started again from the newest checkpoint, and what was lost is counted."""

import dataclasses
import json
import os
import signal
import threading
import time

import numpy as np
import pytest
import ray

from distributed.coordinator import Coordinator
from tests.distributed.test_ray import accepted, ray_config
from tests.runs.test_inline import dreamer_config
from worldloom.pretrained import newest_checkpoint
from worldloom.runs.checkpoint import read_manifest, read_msgpack
from worldloom.runs.config import CheckpointConfig, RuntimeConfig, TrainConfig
from worldloom.runs.inline import InlineTrainer
from worldloom.runs.verify import verify

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.usefixtures("small_cluster", "no_pages")]


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


def slow_config(total_steps=700, **sections):
    steps = TrainConfig(total_steps=total_steps, learning_starts=100, train_ratio=12)
    return ray_config("SlowCounting", **{"train": steps, "checkpoint": CheckpointConfig(interval=300), **sections})


def check(summary, accepted, run_dir, config):
    """Counts agree, and rows are contiguous with a seam at every start."""
    assert summary["status"] == "completed"
    assert config.train.total_steps <= summary["env_steps"] == accepted.steps
    assert accepted.duplicates == 0
    folder = newest_checkpoint(run_dir)
    assert read_msgpack(folder / "learner.msgpack")["updates"] == summary["updates"] - summary["updates_lost"]
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


def test_a_killed_learner_is_started_again_from_the_checkpoint(tmp_path):
    config = slow_config()
    summary, accepted = run_and_kill(config, tmp_path, [(500, "learner")])
    check(summary, accepted, tmp_path, config)
    assert summary["actor_restarts"] == 1
    assert 0 < summary["updates_lost"] < 200  # since step 300: an update every two steps
    assert summary["env_steps_discarded"] == 0
    assert summary["updates"] == summary["env_steps"] // 2  # delivered, in exact proportion, without a burst


def test_a_killed_replay_is_started_again_from_the_checkpoint(tmp_path):
    config = slow_config()
    summary, accepted = run_and_kill(config, tmp_path, [(500, "replay")])
    check(summary, accepted, tmp_path, config)
    assert summary["actor_restarts"] == 1
    assert 0 < summary["env_steps_discarded"] < 400
    assert summary["updates"] == summary["env_steps"] // 2
    assert summary["eval_return_mean"] == 280


@pytest.mark.slow
def test_both_may_die_before_the_first_checkpoint(tmp_path):
    config = slow_config(checkpoint=CheckpointConfig(interval=0))
    summary, accepted = run_and_kill(config, tmp_path, [(300, "learner"), (400, "replay")])
    check(summary, accepted, tmp_path, config)
    assert summary["actor_restarts"] == 2
    assert summary["updates_lost"] >= 100
    assert summary["env_steps_discarded"] >= 400


@pytest.mark.slow
def test_dreamerv3_recovers_with_its_latents(tmp_path):
    config = dreamer_config(
        "SlowCounting",
        runtime=RuntimeConfig(kind="ray", env_actors=1, chunk_steps=8, publish_interval=5, learner_threads=1),
        train=TrainConfig(total_steps=900, learning_starts=100, train_ratio=4),
        checkpoint=CheckpointConfig(interval=200),
    )
    summary, accepted = run_and_kill(config, tmp_path, [(300, "replay"), (600, "learner")])
    check(summary, accepted, tmp_path, config)
    assert summary["actor_restarts"] == 2


@pytest.mark.slow
def test_a_learner_that_dies_again_and_again_ends_the_run(tmp_path):
    coordinator = Coordinator(slow_config(1200, checkpoint=CheckpointConfig(interval=0)), tmp_path)
    stopped = threading.Event()

    def killer():
        while not stopped.is_set():
            try:
                os.kill(ray.get(coordinator.parts.learning.learner.pid.remote(), timeout=60), signal.SIGKILL)
            except Exception:
                time.sleep(0.05)

    try:
        coordinator.start(resume=False)
        thread = threading.Thread(target=killer, daemon=True)
        thread.start()
        with pytest.raises(RuntimeError, match="go on with: python -m launch.train --resume"):
            coordinator.train()
    finally:
        stopped.set()
        thread.join()
        coordinator.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["env_steps"] <= 1300 for line in lines)
    assert dataclasses.is_dataclass(coordinator.config)
