"""Faults of learner and replay: what dies is started again from the newest checkpoint, and what was lost is counted."""

import dataclasses
import json
import os
import signal
import threading
import time

import pytest
import ray

from distributed.coordinator import Coordinator
from tests.distributed.ray_runs import check, run_and_kill, slow_config
from tests.run_configs import dreamer_config
from worldloom.runs.config import CheckpointConfig, RuntimeConfig, TrainConfig

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.usefixtures("small_cluster")]


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


def test_learner_and_replay_may_die_at_the_same_moment(tmp_path):
    config = slow_config()
    summary, accepted = run_and_kill(config, tmp_path, [(500, "learner"), (500, "replay")])
    check(summary, accepted, tmp_path, config)
    assert summary["actor_restarts"] == 2
    assert 0 < summary["updates_lost"] < 200
    assert 0 < summary["env_steps_discarded"] < 400
    assert summary["updates"] == summary["env_steps"] // 2


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
