"""An object store that is too small for what is under way: slower, told of, and nothing lost."""

import dataclasses

import pytest
import ray

from tests.distributed.ray_runs import run
from tests.run_configs import TINY_DREAMER, dreamer_config
from worldloom.report.page import read_metrics
from worldloom.runs.config import LogConfig, ReplayConfig, RuntimeConfig, TrainConfig
from worldloom.runs.verify import verify

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
STORE = 80 * 2**20  # about the least that Ray takes


def test_a_store_that_overflows_slows_the_run_and_says_so(no_cluster, tmp_path, capsys):
    config = dreamer_config(
        "Screen",
        agent={**TINY_DREAMER, "batch_size": 40, "batch_length": 64},  # a batch of 32 MB, and three are under way
        train=TrainConfig(total_steps=800, learning_starts=600, train_ratio=128),
        replay=ReplayConfig(capacity=1500),
        log=LogConfig(interval=100),
        runtime=RuntimeConfig(env_actors=2, chunk_steps=16, publish_interval=5, learner_threads=1),
    )
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=STORE)
    try:
        summary, accepted = run(dataclasses.replace(config), tmp_path)
    finally:
        ray.shutdown()
    assert summary["status"] == "completed"
    assert summary["env_steps"] == accepted.steps >= 800
    assert summary["updates"] == (summary["env_steps"] - 600) // 20
    assert summary["actor_restarts"] == 0
    assert verify(tmp_path) == []
    lines = [line for line in read_metrics(tmp_path) if "plasma/used_fraction" in line]
    assert max(line["plasma/used_fraction"] for line in lines) > 0.3
    spilled = lines[-1]["plasma/spilled_bytes"]
    assert ("object store is too small" in capsys.readouterr().out) == (spilled > 0)
