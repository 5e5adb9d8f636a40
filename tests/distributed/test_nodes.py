"""Nodes that go: removed, drained, and with the learner on them, on a cluster of several raylets."""

import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from distributed.coordinator import Coordinator
from tests.distributed.ray_runs import accepted, check, slow_config
from worldloom.runs.config import CheckpointConfig, RuntimeConfig, TrainConfig

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
STORE = 100 * 2**20


@pytest.fixture
def cluster(no_cluster, tmp_path, monkeypatch):
    """A head that runs nothing but the driver, and three nodes of two processors."""
    monkeypatch.setenv("WORLDLOOM_TEST_MARKS", str(tmp_path))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE})
    for _ in range(3):
        made.add_node(num_cpus=2, object_store_memory=STORE)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def config(actors):
    return slow_config(
        runtime=RuntimeConfig(env_actors=actors, chunk_steps=8, publish_interval=5, learner_threads=1),
        train=TrainConfig(total_steps=4000, learning_starts=100, train_ratio=12),
        checkpoint=CheckpointConfig(interval=300),
    )


def run(made, at, act):
    """Train; when so many steps are done, `act()` from a thread beside."""

    def wait_and_act():
        while made.run.limiter.env_steps < at:
            time.sleep(0.05)
        act()

    threading.Thread(target=wait_and_act, daemon=True).start()
    return made.train()


@pytest.fixture
def coordinator(cluster, tmp_path):
    made = []

    def make(actors):
        made.append(Coordinator(config(actors), tmp_path))
        made[-1].start(resume=False)
        return made[-1]

    yield make
    for each in made:
        each.close()


def node_of(cluster, node_id):
    return next(node for node in cluster.worker_nodes if node.node_id == node_id)


def test_a_node_that_goes_costs_its_env_actors_only(cluster, coordinator, tmp_path):
    made = coordinator(actors=4)
    arrivals, insert = [], made.parts.inserting.begin
    made.parts.inserting.begin = lambda chunk, info: (
        arrivals.append((time.monotonic(), info.key)),
        insert(chunk, info),
    )
    gone = {}

    def remove():
        node = next(c.node for c in made.parts.collecting.collectors if c.node not in (None, made.parts.learning.node))
        gone["actors"] = [c.index for c in made.parts.collecting.collectors if c.node == node]
        gone["at"] = time.monotonic()
        cluster.remove_node(node_of(cluster, node), allow_graceful=False)

    summary = run(made, 800, remove)
    check(summary, accepted(made), tmp_path, made.config)
    assert gone["actors"]
    lost = len(gone["actors"])
    assert lost <= summary["actor_restarts"] <= 3 * lost  # Ray may place one on the node again before it knows
    assert summary["updates_lost"] == 0
    assert summary["env_steps_discarded"] <= 32 * lost
    others = [when for when, key in arrivals if key.actor not in gone["actors"]]
    assert max(b - a for a, b in pairwise(others)) < 5.0  # nobody else stood still


def test_the_learners_node_may_go_with_replay(cluster, coordinator, tmp_path):
    made = coordinator(actors=2)

    def remove():
        cluster.remove_node(node_of(cluster, made.parts.learning.node), allow_graceful=False)

    summary = run(made, 1000, remove)
    check(summary, accepted(made), tmp_path, made.config)
    assert summary["actor_restarts"] >= 2
    assert 0 < summary["updates_lost"] < 400
    assert 0 < summary["env_steps_discarded"] < 800
    assert summary["updates"] == summary["env_steps"] // 2


def test_a_drained_node_hands_over_what_it_has(cluster, coordinator, tmp_path):
    made = coordinator(actors=4)
    drained = {}

    def drain():
        node = next(c.node for c in made.parts.collecting.collectors if c.node not in (None, made.parts.learning.node))
        drained["node"] = node
        ray_command = Path(sys.executable).parent / "ray"
        words = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "drill"]
        subprocess.run(
            [ray_command, "drain-node", "--address", cluster.address, "--node-id", node, *words,
             "--deadline-remaining-seconds", "3600"],
            check=True, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    summary = run(made, 500, drain)
    check(summary, accepted(made), tmp_path, made.config)
    assert drained
    assert all(c.node != drained["node"] for c in made.parts.collecting.collectors)
    assert summary["env_steps_discarded"] == 0
    assert summary["actor_restarts"] == 0
