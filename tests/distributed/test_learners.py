"""Several learners in one run: one draw and one account, equal parameters, and what cannot be configured."""

import dataclasses
import time
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch

from distributed import ranks
from distributed.actors.learner import LearnerActor
from distributed.actors.member import About, GangBroken
from distributed.actors.replay import ReplayActor
from distributed.cluster import share
from distributed.coordinator import Coordinator, train
from distributed.learning import Learning
from tests.distributed.ray_runs import assert_equal_learners, finish, learners_of, matrix_config, several
from tests.distributed.test_lockstep import assert_equal, config, outcome
from tests.run_configs import dreamer_config
from worldloom.manifest import newest_checkpoint, read_manifest
from worldloom.runs.config import CheckpointConfig, TrainConfig

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
clustered = pytest.mark.usefixtures("small_cluster")


@clustered
def test_two_learners_make_the_updates_of_one_run(coordinator, tmp_path, capsys):
    made = coordinator(several(total_steps=300, checkpoint=CheckpointConfig(interval=0)))
    pulses = ray.get([handle.pulse.remote() for handle in learners_of(made)])
    assert not any(preparing for _, preparing in pulses)  # nothing is compiled: a hang is seen from the first update on
    summary = finish(made, tmp_path)
    assert summary["updates"] == summary["env_steps"] // 2  # 12 replayed steps of 8 x 3 a step
    assert summary["actor_restarts"] == summary["learner_restarts"] == summary["updates_lost"] == 0
    assert_equal_learners(made, summary["updates"])
    assert "2 learners on 1 node: each learns from 4 of 8 windows" in capsys.readouterr().out
    # A reference that is still owed holds back neither the heartbeat nor what is asked later.
    owed = ray.remote(num_cpus=0)(lambda: time.sleep(60)).remote()
    learners_of(made)[0].write.remote(tmp_path, [owed])
    learners_of(made)[0].update_share.remote([owed])
    assert ray.get(learners_of(made)[0].pulse.remote(), timeout=20)
    ray.cancel(owed, force=True)


# Configurations


def free(monkeypatch, gpus):
    monkeypatch.setattr("distributed.cluster.free_cpus_by_node", lambda: [8.0])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": gpus})
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


def test_gpus_of_processes_that_have_just_ended_are_waited_for(monkeypatch, capsys):
    free(monkeypatch, 4.0)
    found = iter([0.0, 3.0, 4.0])
    monkeypatch.setattr(ray, "available_resources", lambda: {"GPU": next(found)})
    assert share(several(4, train=TrainConfig(device="auto"))).gpus == 1.0
    assert capsys.readouterr().out.count("waiting for free GPUs in the cluster: 4 are wanted, 0 are free") == 1


def test_a_learner_whose_batch_never_comes_says_so(monkeypatch):
    waited = []

    def get(reference, timeout):
        waited.append(timeout)
        raise ray.exceptions.GetTimeoutError

    monkeypatch.setattr(ray, "get", get)
    member = SimpleNamespace(name="learner/1", seconds=600.0)
    with pytest.raises(GangBroken, match="learner/1 got no batch for 600 s"):
        LearnerActor.update_share(SimpleNamespace(_member=member), ["a reference"])
    assert waited == [600.0]


def test_what_a_lost_learner_owed_to_replay_is_forgotten(monkeypatch):
    made = Learning(SimpleNamespace(env=None), SimpleNamespace())
    made._writes, made.tasks = ["a reference that never comes"], deque(["a task"])
    spec = SimpleNamespace(batch_size=8, windows=SimpleNamespace(length=4))
    made.ranks = SimpleNamespace(start=lambda: spec)
    monkeypatch.setattr("distributed.learning.replay_columns", lambda env, spec: {})
    made.start()
    assert not made.to_settle


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


# Shares


def test_replay_divides_its_draw_as_a_gang_does():
    whole = {"rows": torch.arange(24).reshape(8, 3).numpy(), "obs": torch.rand(8, 3, 5).numpy()}
    replay = SimpleNamespace(_batch_size=8, sample=lambda batches: [whole] * batches)
    shares = ReplayActor.sample_shares(replay, 2, 4)
    for rank, batches in enumerate(shares):
        assert len(batches) == 2
        for name, value in batches[1].items():
            torch.testing.assert_close(torch.from_numpy(value), torch.from_numpy(whole[name]).chunk(4)[rank])


# Resuming, and runtime.sync


def go_on(made, run_dir):
    """A whole run, resumed where there is a checkpoint."""
    coordinator = Coordinator(made, run_dir)
    try:
        coordinator.start(resume=(run_dir / "checkpoints").exists())
        summary = finish(coordinator, run_dir)
        if len(learners_of(coordinator)) > 1:
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
@pytest.mark.parametrize("family", ["tdmpc2", "dreamerv3", "storm", "diamond"])
def test_in_turn_two_learners_give_the_same_bits_in_every_run(family, tmp_path):
    made = config(family, learners=2)
    for name in ("a", "b"):
        assert train(made, tmp_path / name)["status"] == "completed"
    assert_equal(outcome(tmp_path / "a", made), outcome(tmp_path / "b", made))


@clustered
@pytest.mark.slow
@pytest.mark.parametrize("family", ["tdmpc2", "dreamerv3", "storm", "diamond"])
def test_in_turn_two_learners_that_are_resumed_give_the_bits_of_a_run_that_never_stopped(family, tmp_path):
    made, stopped = config(family, learners=2), tmp_path / "stopped"
    train(made, tmp_path / "whole")
    train(config(family, steps=200, learners=2), stopped)
    for folder in (stopped / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) >= 200:  # as if it had been killed on the way
            (folder / "manifest.json").unlink()
    train(made, stopped, resume=True)
    found = [outcome(folder, made) for folder in (stopped, tmp_path / "whole")]
    for each in found:
        each.pop("metrics")  # those of the stretch that was lost stand there twice
    assert_equal(*found)


@clustered
@pytest.mark.slow
def test_the_latents_of_every_learner_reach_replay(tmp_path):
    found = {}
    for learners in (1, 2):
        made = config("dreamerv3", steps=160, learners=learners)
        assert train(made, tmp_path / str(learners))["updates"] > 5
        found[learners] = outcome(tmp_path / str(learners), made)["rows"]["deter"]
    distance = np.abs(found[1] - found[2]).reshape(len(found[1]), -1).max(1)
    assert (distance < 1e-3).mean() > 0.9  # half of the rows that were written back, were those of one learner lost


@clustered
@pytest.mark.slow
@pytest.mark.parametrize("server", ["learner", "actor"])
def test_learners_share_what_several_shards_hold_and_act_for_others(server, coordinator, tmp_path):
    made = coordinator(
        matrix_config("dreamerv3", 2, shards=2, learners=2, acting="server", acting_server=server, receipt_interval=10)
    )
    summary = finish(made, tmp_path)
    assert summary["updates"] == (summary["env_steps"] - 100) * 4 // 32  # 4 replayed steps of 4 x 8 a step
    assert summary["actor_restarts"] == 0
    assert_equal_learners(made, summary["updates"])


@clustered
@pytest.mark.slow
def test_nodes_with_different_versions_of_torch_end_the_run_before_it_learns(monkeypatch, coordinator, tmp_path):
    monkeypatch.setattr(ranks, "LearnerActor", OfAnotherVersion)
    with pytest.raises(RuntimeError, match="the learners have different versions of torch .* Install one version"):
        coordinator(several())
    assert not (tmp_path / "metrics.jsonl").exists()


class OfAnotherVersion(LearnerActor):
    """A learner whose node, but for that of rank 0, has another version of torch."""

    def about(self):
        found = super().about()
        return found if repr(self) == "learner/0" else dataclasses.replace(found, torch="2.0.0")


# GPUs


@clustered
@pytest.mark.gpu
@pytest.mark.parametrize(("device", "gpus", "backend"), [("cuda", 2, "nccl"), ("cuda:0", 1, "gloo")])
@pytest.mark.parametrize("compiled", [False, "auto"])
@pytest.mark.parametrize("family", ["tdmpc2", "dreamerv3"])
def test_learners_on_gpus_make_equal_updates(family, compiled, device, gpus, backend, coordinator, tmp_path):
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    ratio = {"tdmpc2": 12, "dreamerv3": 4}[family]
    steps = TrainConfig(total_steps=700, learning_starts=100, train_ratio=ratio, device=device, compile=compiled)
    configured = several(train=steps)
    if family == "dreamerv3":
        configured = dreamer_config("SlowCounting", train=steps, runtime=configured.runtime)
    made = coordinator(configured)
    assert made.parts.learning.ranks.backend == backend
    summary = finish(made, tmp_path)
    assert_equal_learners(made, summary["updates"])
