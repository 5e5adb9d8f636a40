"""The published sets of tasks: their order fixes the rows of a multi-task model's embedding."""

import hashlib

import pytest
import torch

from worldloom import create_world_model
from worldloom.tdmpc2 import TASK_SETS

MT30_SHA256 = "729b9c29c7f46d91166114195bf33c21bf6b2fa07f1e6c89b4d463888801e8c4"
MT80_SHA256 = "3f2c916029df0443e9776d11394e3d03417d7e2587ff5e2168e8537460fd4a4d"


@pytest.mark.parametrize(("tasks", "digest"), [("mt30", MT30_SHA256), ("mt80", MT80_SHA256)])
def test_task_sets_have_the_published_order(tasks, digest):
    """The digests are of the names in section 2 of the specification, joined by spaces."""
    names = " ".join(task.name for task in TASK_SETS[tasks])
    assert hashlib.sha256(names.encode()).hexdigest() == digest


def test_tasks_have_the_actions_and_episodes_of_their_family():
    found = [(task.action_dim, task.episode_length) for task in TASK_SETS["mt80"]]
    sizes = [6] * 4 + [2] * 2 + [1] * 6 + [2] * 4 + [5, 4, 4] + [6] * 6 + [4, 3, 3, 2, 1]
    assert found == [(size, 500) for size in sizes] + [(4, 100)] * 50


def test_parameter_counts_of_the_largest_multi_task_model_equal_the_reference():
    with torch.device("meta"):
        model = create_world_model("tdmpc2:317m", (39,), 6, device="meta", tasks="mt80")
    parts = (model.encoder, model.dynamics, model.reward, model.policy, model.q, model.task_embedding)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert counts == [56_573_984, 28_495_904, 23_269_477, 22_880_268, 186_155_816, 7_680]
    assert sum(counts) == 317_383_129
