"""Several learners in one run: one draw and one account, equal parameters, losses, and what cannot be configured."""

import pytest
import ray

from tests.distributed.ray_runs import finish, slow_config
from worldloom.runs.config import CheckpointConfig, RuntimeConfig

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.usefixtures("small_cluster", "no_pages")]


def runtime(**fields):
    chosen = {"env_actors": 1, "learners": 2, "chunk_steps": 8, "publish_interval": 5, "learner_threads": 1}
    return RuntimeConfig(**{**chosen, "receipt_interval": 10, **fields})


def receipts(made):
    return ray.get([handle.receipt.remote() for handle in made.parts.learning.ranks.handles])


def test_two_learners_make_the_updates_of_one_run(coordinator, tmp_path, capsys):
    made = coordinator(slow_config(runtime=runtime(), total_steps=500, checkpoint=CheckpointConfig(interval=0)))
    summary = finish(made, tmp_path)
    assert summary["updates"] == summary["env_steps"] // 2  # 12 replayed steps of 8 x 3 a step
    assert summary["actor_restarts"] == summary["learner_restarts"] == summary["updates_lost"] == 0
    one, other = receipts(made)
    assert one == other
    assert one.updates == summary["updates"]
    assert "2 learners on 1 node: each learns from 4 of 8 windows" in capsys.readouterr().out
