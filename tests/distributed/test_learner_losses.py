"""One of several learners is lost, or differs: all start again together, as many as the cluster has room for."""

import dataclasses
import os
import signal

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from distributed import learning, ranks, watching
from distributed.actors.learner import LearnerActor
from tests.distributed.ray_runs import assert_equal_learners, finish, learners_of, several
from worldloom.runs.config import ReplayConfig

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
clustered = pytest.mark.usefixtures("small_cluster")
STORE = 100 * 2**20
FROZEN = {"silence_timeout": 4.0}  # no shorter where nothing freezes: a busy machine is silent for seconds


@pytest.fixture
def quick_to_see(monkeypatch):
    monkeypatch.setattr(watching, "BEAT_SECONDS", 0.2)


def runtime_of(how):
    return FROZEN if how == signal.SIGSTOP else {}


def at(made, steps, act):
    """Do this once so many steps are done, with no checkpoint under way; return a list that is then empty."""
    advance, left = made.pace.advance, [act]

    def advance_and_act(stop):
        advance(stop)
        if left and made.run.limiter.env_steps >= steps and made.parts.checkpoints.saving is None:
            left.pop()()

    made.pace.advance = advance_and_act
    return left


def strike(pids, how):
    for pid in pids:
        os.kill(pid, how)


@clustered
@pytest.mark.slow
@pytest.mark.parametrize("victims", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_learner_ends_all_and_they_start_again(victims, how, quick_to_see, coordinator, tmp_path, capsys):
    made = coordinator(several(2, runtime_of(how)))
    pids = [ray.get(learners_of(made)[rank].pid.remote()) for rank in victims]
    left = at(made, 450, lambda: strike(pids, how))
    summary = finish(made, tmp_path)
    assert not left
    assert summary["actor_restarts"] == summary["learner_restarts"] == 1
    assert 0 < summary["updates_lost"] < 120  # since step 300
    assert summary["env_steps_discarded"] == 0
    assert summary["updates"] == summary["env_steps"] // 2
    assert_equal_learners(made, summary["updates"] - summary["updates_lost"])
    assert "2 learners ended; 2 started again from step-" in capsys.readouterr().out


@clustered
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_rank_0_may_be_lost_in_a_checkpoint(how, quick_to_see, coordinator, tmp_path, capsys):
    made = coordinator(several(2, runtime_of(how)))
    begin, pid, struck = made.parts.begin_checkpoint, ray.get(learners_of(made)[0].pid.remote()), []

    def begin_and_strike():
        made.parts.begin_checkpoint = begin
        begin()
        os.kill(pid, how)
        struck.extend((made.run.limiter.updates, made.parts.checkpoints.saving.env_steps))

    made.parts.begin_checkpoint = begin_and_strike
    summary = finish(made, tmp_path)
    updates, steps = struck
    assert summary["learner_restarts"] == 1
    assert summary["updates_lost"] == updates > 100  # there is no other checkpoint
    assert summary["updates"] == summary["env_steps"] // 2
    assert "the checkpoint that was being written is lost with it" in capsys.readouterr().out
    kept = {folder.name: (folder / "manifest.json").exists() for folder in (tmp_path / "checkpoints").glob("step-*")}
    assert kept
    assert all(kept.values())
    assert not [name for name in kept if int(name.removeprefix("step-").split("-")[0]) == steps]


class Spoilt(LearnerActor):
    """A learner that can come to differ from the others."""

    def spoil(self, what):
        with torch.no_grad():
            if what == "parameters":
                next(self._agent.world_model.parameters())[0, 0] += 1e-3
            else:
                torch.rand(1, generator=self._agent.learning.generator)


@clustered
@pytest.mark.slow
@pytest.mark.parametrize("what", ["parameters", "noise"])
def test_learners_that_differ_are_started_again(what, monkeypatch, coordinator, tmp_path, capsys):
    monkeypatch.setattr(ranks, "LearnerActor", Spoilt)
    made = coordinator(several())
    left = at(made, 450, lambda: learners_of(made)[1].spoil.remote(what))
    summary = finish(made, tmp_path)
    assert not left
    assert summary["learner_restarts"] == 1
    assert "learner/1 differs from learner/0 after the same updates" in capsys.readouterr().out
    assert_equal_learners(made, summary["updates"] - summary["updates_lost"])


@clustered
@pytest.mark.slow
def test_no_checkpoint_is_kept_of_learners_that_differ(monkeypatch, coordinator, tmp_path, capsys):
    monkeypatch.setattr(ranks, "LearnerActor", Spoilt)
    made = coordinator(several(2, {"receipt_interval": 10**6}))  # between two comparisons
    left = at(made, 450, lambda: learners_of(made)[1].spoil.remote("parameters"))
    summary = finish(made, tmp_path)
    assert not left
    assert summary["learner_restarts"] == 1
    assert "learner/1 differs from learner/0 after the same updates" in capsys.readouterr().out
    assert_equal_learners(made, summary["updates"] - summary["updates_lost"])


@clustered
@pytest.mark.slow
def test_replay_may_be_lost_and_the_learners_live_on(quick_to_see, monkeypatch, coordinator, tmp_path):
    monkeypatch.setattr(learning, "STRAGGLER_SECONDS", 60.0)  # both fail alike, however busy the machine is
    made = coordinator(several())
    pid = ray.get(made.parts.replay.handles[0].pid.remote())
    left = at(made, 450, lambda: os.kill(pid, signal.SIGKILL))
    summary = finish(made, tmp_path)
    assert not left
    assert summary["learner_restarts"] == summary["updates_lost"] == 0
    assert summary["actor_restarts"] == 1


# Several machines


@pytest.fixture
def cluster(no_cluster):
    """A head that runs nothing but the driver, and three nodes of two processors."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE})
    for _ in range(3):
        made.add_node(num_cpus=2, object_store_memory=STORE)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(("learners", "env_actors", "expected"), [(4, 1, (1, 2)), (2, 4, (1,))])
def test_a_node_takes_its_learners_with_it_and_fewer_go_on(
    learners, env_actors, expected, cluster, coordinator, tmp_path, capsys
):
    replay = ReplayConfig(capacity=2000, shards=min(2, env_actors))
    configured = several(learners, {"env_actors": env_actors}, total_steps=2000)
    made = coordinator(dataclasses.replace(configured, replay=replay))
    nodes = made.parts.learning.ranks.nodes
    assert len(set(nodes)) >= learners // 2  # of two processors
    assert set(made.parts.replay.nodes) <= set(nodes)  # shards lie near the learners
    assert {collector.node for collector in made.parts.collecting.collectors} - set(nodes)  # not all act there

    def remove():
        cluster.remove_node(next(n for n in cluster.worker_nodes if n.node_id == nodes[-1]), allow_graceful=False)

    left = at(made, 700, remove)
    summary = finish(made, tmp_path)
    assert not left
    assert summary["learner_restarts"] >= 1
    assert made.parts.learning.ranks.size in expected
    assert nodes[-1] not in made.parts.learning.ranks.nodes
    assert summary["updates"] == summary["env_steps"] // 2
