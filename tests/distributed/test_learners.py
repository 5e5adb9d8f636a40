"""Several learners in one run: one draw and one account, equal parameters, losses, and what cannot be configured."""

import dataclasses
import os
import signal
from types import SimpleNamespace

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from distributed import ranks, watching
from distributed.actors.learner import LearnerActor
from distributed.actors.member import About, Receipt
from distributed.actors.replay import ReplayActor
from distributed.cluster import share
from distributed.coordinator import Coordinator
from distributed.launcher import ActorLost, WorkLost
from distributed.learning import Learning, Task
from tests.distributed.ray_runs import finish, slow_config
from tests.distributed.test_lockstep import assert_equal, config, outcome
from worldloom.manifest import newest_checkpoint, read_manifest
from worldloom.runs.config import CheckpointConfig, TrainConfig

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.usefixtures("no_pages")]
clustered = pytest.mark.usefixtures("small_cluster")
STORE = 100 * 2**20


def several(learners=2, **sections):
    """A run of 700 steps, an update every two, with checkpoints at 300 and 600."""
    made = slow_config(**sections)
    chosen = {"learners": learners, "env_actors": 1, "silence_timeout": 4.0, "receipt_interval": 10}
    return dataclasses.replace(made, runtime=dataclasses.replace(made.runtime, **chosen))


def handles(made):
    return made.parts.learning.ranks.handles


def assert_equal_learners(made, updates):
    found = ray.get([handle.receipt.remote() for handle in handles(made)])
    assert all(receipt == found[0] for receipt in found)
    assert found[0].updates == updates


@clustered
def test_two_learners_make_the_updates_of_one_run(coordinator, tmp_path, capsys):
    made = coordinator(several(total_steps=300, checkpoint=CheckpointConfig(interval=0)))
    summary = finish(made, tmp_path)
    assert summary["updates"] == summary["env_steps"] // 2  # 12 replayed steps of 8 x 3 a step
    assert summary["actor_restarts"] == summary["learner_restarts"] == summary["updates_lost"] == 0
    assert_equal_learners(made, summary["updates"])
    assert "2 learners on 1 node: each learns from 4 of 8 windows" in capsys.readouterr().out


# Configurations


def free(monkeypatch, gpus):
    monkeypatch.setattr("distributed.cluster.free_cpus_by_node", lambda: [8.0])
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 8.0, "GPU": gpus})


@pytest.mark.parametrize(
    ("device", "gpus", "server", "expected"),
    [
        ("auto", 4.0, "learner", (1.0, 0.0)),
        ("cuda", 5.0, "actor", (1.0, 1.0)),
        ("auto", 0.0, "learner", (0.0, 0.0)),
        ("cpu", 4.0, "learner", (0.0, 0.0)),
        ("cuda:0", 1.0, "learner", (0.25, 0.0)),
        ("auto", 3.0, "learner", "runtime.learners is 4, each on a GPU of its own, but 3 GPUs of the cluster are free"),
        ("cuda", 4.0, "actor", "and the acting server another .runtime.acting_server: actor., but 4 GPUs"),
        ("cuda", 0.0, "learner", "train.device is 'cuda', but the cluster has 0 free GPUs"),
    ],
)
def test_each_learner_has_a_gpu_of_its_own_or_all_share_one(device, gpus, server, expected, monkeypatch):
    free(monkeypatch, gpus)
    made = several(4, train=TrainConfig(device=device))
    runtime = dataclasses.replace(made.runtime, acting="server", acting_server=server)
    made = dataclasses.replace(made, runtime=runtime)
    if isinstance(expected, str):
        with pytest.raises(RuntimeError, match=expected):
            share(made)
        return
    shares = share(made)
    assert (shares.gpus, shares.server_gpus) == expected
    assert shares.processes == 5 + (server == "actor")


def test_versions_of_torch_must_agree():
    ranks.check_versions([About("a" * 40, "2.13.0", False), About("b" * 40, "2.13.0", False)])
    with pytest.raises(
        RuntimeError, match=r"different versions of torch \(2.13.0 on node aaaaaaaa, 2.12.1 on node bbbb"
    ):
        ranks.check_versions([About("a" * 40, "2.13.0", False), About("b" * 40, "2.12.1", False)])


@clustered
def test_learners_without_room_are_refused(monkeypatch, coordinator):
    monkeypatch.setattr(ranks, "START_SECONDS", 1.0)
    monkeypatch.setattr("distributed.coordinator.share", lambda made: dataclasses.replace(share(made), cpus=1.5))
    with pytest.raises(RuntimeError, match=r"no room for 2 learners \(runtime.learners\) of {'CPU': 1.5} each"):
        coordinator(several())


# Shares and receipts


def test_replay_divides_its_draw_as_a_gang_does():
    whole = {"rows": torch.arange(24).reshape(8, 3).numpy(), "obs": torch.rand(8, 3, 5).numpy()}
    replay = SimpleNamespace(_batch_size=8, sample=lambda batches: [whole] * batches)
    shares = ReplayActor.sample_shares(replay, 2, 4)
    for rank, batches in enumerate(shares):
        assert len(batches) == 2
        for name, value in batches[1].items():
            torch.testing.assert_close(torch.from_numpy(value), torch.from_numpy(whole[name]).chunk(4)[rank])


@pytest.mark.parametrize(
    ("outcomes", "expected", "broken"),
    [
        ([ActorLost("learner/0 died."), ActorLost("learner/1: connection closed")], ActorLost, True),
        ([WorkLost("replay"), WorkLost("replay")], WorkLost, False),  # nobody learned anything
        ([WorkLost("replay"), ActorLost("closed")], ActorLost, True),
        ([ActorLost("closed"), FloatingPointError("NaN")], FloatingPointError, True),
        ([Receipt(20, 4, "a"), Receipt(20, 4, "b")], ActorLost, True),
        ([Receipt(20, 4, "a"), Receipt(22, 4, "a")], ActorLost, True),
        ([Receipt(20, 4, None), Receipt(20, 4, None)], None, False),
    ],
)
def test_what_leaves_learners_apart_breaks_the_gang(outcomes, expected, broken):
    from distributed.actors.learner import UpdateResult

    learning = Learning(SimpleNamespace(config=None, launcher=None), None)
    learning.ranks.handles = [None, None]
    results = [UpdateResult({}, 2, 0.1, 0.0, None, each) if isinstance(each, Receipt) else each for each in outcomes]
    task = Task([1, 2], [3, 4], [5, 6], 2, 0, dict(enumerate(results)))
    if expected is None:
        assert learning._results(task) == results
    else:
        with pytest.raises(expected):
            learning._results(task)
    assert learning.ranks.broken == broken


# Losses


@pytest.fixture
def quick_to_see(monkeypatch):
    monkeypatch.setattr(watching, "BEAT_SECONDS", 0.2)


def strike_at(made, steps, victims, how):
    """Kill or freeze these ranks once so many steps are done, with no checkpoint under way."""
    advance = made.pace.advance
    pids = [ray.get(handles(made)[rank].pid.remote()) for rank in victims]

    def advance_and_strike(stop):
        advance(stop)
        if pids and made.run.limiter.env_steps >= steps and made.parts.checkpoints.saving is None:
            while pids:
                os.kill(pids.pop(), how)

    made.pace.advance = advance_and_strike
    return pids


@clustered
@pytest.mark.slow
@pytest.mark.parametrize("victims", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_learner_ends_all_and_they_start_again(victims, how, quick_to_see, coordinator, tmp_path, capsys):
    made = coordinator(several())
    left = strike_at(made, 450, victims, how)
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
def test_rank_0_may_be_lost_in_a_checkpoint(how, quick_to_see, coordinator, tmp_path):
    made = coordinator(several())
    begin, pid = made.parts.begin_checkpoint, ray.get(handles(made)[0].pid.remote())

    def begin_and_strike():
        made.parts.begin_checkpoint = begin
        begin()
        os.kill(pid, how)

    made.parts.begin_checkpoint = begin_and_strike
    summary = finish(made, tmp_path)
    assert summary["learner_restarts"] == 1
    assert summary["updates"] == summary["env_steps"] // 2


@clustered
@pytest.mark.slow
def test_learners_that_differ_are_started_again(monkeypatch, coordinator, tmp_path, capsys):
    class Spoilt(LearnerActor):
        def spoil(self):
            with torch.no_grad():
                next(self._agent.world_model.parameters())[0, 0] += 1e-3

    monkeypatch.setattr(ranks, "LearnerActor", Spoilt)
    made = coordinator(several())
    advance, spoilt = made.pace.advance, []

    def advance_and_spoil(stop):
        advance(stop)
        if not spoilt and made.run.limiter.env_steps >= 450:
            spoilt.append(handles(made)[1].spoil.remote())

    made.pace.advance = advance_and_spoil
    summary = finish(made, tmp_path)
    assert summary["learner_restarts"] == 1
    assert "learner/1 differs from learner/0 after the same updates" in capsys.readouterr().out
    assert_equal_learners(made, summary["updates"] - summary["updates_lost"])


@clustered
@pytest.mark.slow
def test_replay_may_be_lost_and_the_learners_live_on(quick_to_see, coordinator, tmp_path):
    made = coordinator(several())
    advance, pids = made.pace.advance, [ray.get(made.parts.replay.handles[0].pid.remote())]

    def advance_and_kill(stop):
        advance(stop)
        if pids and made.run.limiter.env_steps >= 450 and made.parts.checkpoints.saving is None:
            os.kill(pids.pop(), signal.SIGKILL)

    made.pace.advance = advance_and_kill
    summary = finish(made, tmp_path)
    assert summary["learner_restarts"] == summary["updates_lost"] == 0
    assert summary["actor_restarts"] == 1


# Resuming, and runtime.sync


def go_on(made, run_dir):
    """A whole run, resumed where there is a checkpoint."""
    coordinator = Coordinator(made, run_dir)
    try:
        coordinator.start(resume=(run_dir / "checkpoints").exists())
        summary = finish(coordinator, run_dir)
        if len(handles(coordinator)) > 1:
            assert_equal_learners(coordinator, summary["updates"])
        return summary
    finally:
        coordinator.close()


@clustered
@pytest.mark.slow
def test_a_checkpoint_of_any_number_of_learners_resumes_on_any_other(tmp_path):
    for steps, learners in ((300, 2), (400, 1), (500, 4), (600, 2)):
        summary = go_on(several(learners, total_steps=steps), tmp_path)
        assert summary["updates"] == summary["env_steps"] // 2
        assert read_manifest(newest_checkpoint(tmp_path))["limiter"]["updates"] == summary["updates"]


@clustered
@pytest.mark.slow
@pytest.mark.parametrize("family", ["tdmpc2", "dreamerv3"])
def test_in_turn_two_learners_give_the_same_bits_in_every_run(family, tmp_path):
    made = config(family, learners=2)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        go_on_in_turn(made, tmp_path / name)
    assert_equal(outcome(tmp_path / "a", made), outcome(tmp_path / "b", made))


def go_on_in_turn(made, run_dir):
    from distributed.coordinator import train

    assert train(made, run_dir)["status"] == "completed"


# GPUs


@clustered
@pytest.mark.gpu
@pytest.mark.parametrize(("device", "gpus", "backend"), [("cuda", 2, "nccl"), ("cuda:0", 1, "gloo")])
def test_learners_on_gpus_make_equal_updates(device, gpus, backend, coordinator, tmp_path):
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    steps = TrainConfig(total_steps=700, learning_starts=100, train_ratio=12, device=device, compile=False)
    made = coordinator(several(train=steps))
    assert made.parts.learning.ranks.backend == backend
    summary = finish(made, tmp_path)
    assert_equal_learners(made, summary["updates"])


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
def test_a_node_takes_its_learners_with_it_and_fewer_go_on(cluster, coordinator, tmp_path, capsys):
    made = coordinator(several(4, total_steps=2000))
    nodes = made.parts.learning.ranks.nodes
    assert len(set(nodes)) >= 2  # four processors of learners
    gone, advance = [], made.pace.advance

    def advance_and_remove(stop):
        advance(stop)
        if not gone and made.run.limiter.env_steps >= 700:
            gone.append(nodes[-1])
            node = next(node for node in cluster.worker_nodes if node.node_id == nodes[-1])
            cluster.remove_node(node, allow_graceful=False)

    made.pace.advance = advance_and_remove
    summary = finish(made, tmp_path)
    assert gone
    assert summary["learner_restarts"] >= 1
    assert made.parts.learning.ranks.size in (1, 2)
    assert gone[0] not in made.parts.learning.ranks.nodes
    assert summary["updates"] == summary["env_steps"] // 2
