"""Fault drills on one small cluster: deaths between two steps of a protocol, disks that refuse, slow actors."""

import dataclasses
import os
import re
import signal
import threading

import numpy as np
import pytest
import ray

import worldloom.runs.run
from distributed.coordinator import train
from distributed.launcher import ActorLost, result_of
from tests.distributed.ray_runs import (
    accepted,
    check,
    complete_each_checkpoint,
    finish,
    kill,
    matrix_config,
    ray_config,
    run_and_kill,
    slow_config,
)
from worldloom import load_agent
from worldloom.manifest import newest_checkpoint
from worldloom.report.page import read_metrics
from worldloom.runs.config import CheckpointConfig, ReplayConfig, RuntimeConfig, TrainConfig
from worldloom.runs.inline import InlineTrainer
from worldloom.runs.verify import verify

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.usefixtures("small_cluster")]


def test_a_chunk_that_an_actor_gave_before_it_died_is_accepted_once(coordinator, tmp_path):
    made = coordinator(slow_config())
    collector = made.parts.collecting.collectors[0]
    while not collector.idle:
        made.parts.take_ready(timeout=10)
    made.parts.collecting.collect(collector, made.parts.collecting.budget.steps())
    ray.wait([collector.task])  # it is there, and not taken in yet
    kill(collector.handle)
    made.parts.take_ready(timeout=10)
    info = next(iter(made.parts.inserting.under_way.values()))
    assert info.key == (0, 0, 0)
    while made.parts.inserting.under_way:
        made.parts.take_ready(timeout=10)
    assert made.run.limiter.env_steps == info.steps > 0
    summary = finish(made, tmp_path)
    assert summary["actor_restarts"] == 1
    assert summary["env_steps_discarded"] <= 16  # what the dead actor was asked for next counts, and no more


@pytest.mark.timeout(240)
def test_an_actor_whose_chunk_tells_of_a_lost_server_goes_on(coordinator, tmp_path):
    made = coordinator(slow_config(300))
    begin, told = made.parts.inserting.begin, []

    def begin_and_tell(chunk, info):
        begin(chunk, info)
        if not told:
            told.append(info)
            raise ActorLost("the acting server died.")  # as `blame_server` does

    made.parts.inserting.begin = begin_and_tell
    summary = finish(made, tmp_path)
    assert told
    assert summary["env_steps"] >= 300
    assert summary["env_steps_discarded"] == 0


@pytest.mark.slow
def test_a_chunk_that_comes_twice_counts_once(coordinator, tmp_path):
    made = coordinator(ray_config(actors=2))
    insert = made.parts.replay.insert

    def insert_again(chunk, actor):
        insert(chunk, actor)  # as if its acknowledgement had been lost
        return insert(chunk, actor)

    made.parts.replay.insert = insert_again
    summary = made.train()
    counts = accepted(made)
    assert counts.duplicates == counts.chunks > 10
    assert summary["env_steps"] == counts.steps
    assert summary["updates"] == summary["env_steps"] // 2
    assert verify(tmp_path) == []


@pytest.mark.slow
def test_all_env_actors_may_die_at_once(coordinator, tmp_path):
    made = coordinator(slow_config(runtime=RuntimeConfig(env_actors=2, chunk_steps=8, learner_threads=1)))
    while made.run.limiter.updates < 50:
        made.pace.advance(None)
    for collector in made.parts.collecting.collectors:
        kill(collector.handle)
    summary = finish(made, tmp_path)
    assert summary["actor_restarts"] == 2
    assert summary["env_steps_discarded"] <= 2 * 16
    assert summary["updates"] == summary["env_steps"] // 2


@pytest.mark.parametrize("where", ["actor", pytest.param("learner", marks=pytest.mark.slow)])
def test_an_acting_server_that_dies_loses_no_step(where, tmp_path):
    runtime = RuntimeConfig(
        env_actors=2, chunk_steps=8, publish_interval=5, learner_threads=1, acting="server", acting_server=where
    )
    config = slow_config(runtime=runtime)
    victim = "server" if where == "actor" else "learner"
    summary, counts = run_and_kill(config, tmp_path, [(500, victim)])
    check(summary, counts, tmp_path, config)
    assert summary["actor_restarts"] == 1
    assert summary["env_steps_discarded"] == 0
    assert (summary["updates_lost"] > 0) == (where == "learner")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["actor", "learner"])
def test_an_acting_server_that_dies_in_an_evaluation_plays_it_again(where, coordinator, tmp_path):
    runtime = RuntimeConfig(env_actors=1, chunk_steps=8, learner_threads=1, acting="server", acting_server=where)
    made = coordinator(slow_config(runtime=runtime))
    begin, killed = made.parts.evaluating.set_aside, []

    def begin_and_kill():
        reference = begin()
        if not killed:
            killed.append(made.parts.state.server)
            kill(made.parts.state.server)
        return reference

    made.parts.evaluating.set_aside = begin_and_kill
    summary = finish(made, tmp_path)
    assert killed
    assert summary["actor_restarts"] == 1  # of the server; the env actor lives on
    assert summary["eval_return_mean"] == 280


@pytest.mark.slow
def test_a_shard_that_dies_while_it_is_restored_is_counted_once(coordinator, tmp_path):
    made = coordinator(slow_config(replay=ReplayConfig(capacity=2000, shards=2), **two_actors()))
    restart, struck = made.parts.replay.restart, []

    def restart_and_die(shard, node, checkpoint):
        if len(struck) < 2:
            struck.append(shard)
            kill(made.parts.replay.handles[1 - shard])  # so that the next one fails half-way
        return restart(shard, node, checkpoint)

    made.parts.replay.restart = restart_and_die
    begin = made.parts.begin_checkpoint

    def begin_then_kill():
        begin()
        if made.run.limiter.env_steps >= 600 and not struck:
            made.parts.finish_checkpoint()
            kill(made.parts.replay.handles[0])

    made.parts.begin_checkpoint = begin_then_kill
    summary = finish(made, tmp_path)
    assert struck
    assert 0 <= summary["env_steps_discarded"] < 900


def two_actors():
    return {"runtime": RuntimeConfig(env_actors=2, chunk_steps=8, publish_interval=5, learner_threads=1)}


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["learner", "replay"])
def test_a_death_while_a_checkpoint_is_written_leaves_a_whole_one(victim, coordinator, tmp_path):
    made = coordinator(slow_config())
    begin, killed = made.parts.begin_checkpoint, []

    def begin_and_kill():
        begin()
        if not killed and made.run.limiter.env_steps >= 600:
            handle = made.parts.learning.learner if victim == "learner" else made.parts.replay.handles[0]
            killed.append(made.run.limiter.env_steps)
            os.kill(pids[victim], signal.SIGKILL)
            assert handle is not None

    pids = {
        "learner": ray.get(made.parts.learning.learner.pid.remote()),
        "replay": ray.get(made.parts.replay.handles[0].pid.remote()),
    }
    made.parts.begin_checkpoint = begin_and_kill
    summary = finish(made, tmp_path)
    assert killed
    assert summary["actor_restarts"] == 1
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


def test_a_disk_that_refuses_does_not_end_a_run_and_harms_no_checkpoint(coordinator, tmp_path):
    made = coordinator(slow_config(600, checkpoint=CheckpointConfig(interval=100)))
    rows, aside = tmp_path / "checkpoints" / "rows", tmp_path / "aside"
    begin, found = made.parts.begin_checkpoint, {}

    def begin_on_a_bad_disk():
        step = made.run.limiter.env_steps
        if 200 <= step < 400 and not rows.is_symlink():
            made.parts.finish_checkpoint()
            found["before"] = verify(tmp_path)
            rows.rename(aside)
            rows.symlink_to("/proc")  # nobody can make files there
        elif step >= 400 and rows.is_symlink():
            made.parts.finish_checkpoint()
            rows.unlink()
            aside.rename(rows)
            found["after"] = newest_checkpoint(tmp_path).name, verify(tmp_path)
        begin()

    made.parts.begin_checkpoint = begin_on_a_bad_disk
    complete_each_checkpoint(made)
    summary = finish(made, tmp_path)
    assert summary["checkpoints_failed"] == 2
    assert found["before"] == []
    name, broken = found["after"]
    assert broken == []
    assert 100 <= int(name.removeprefix("step-")) < 200
    assert summary["env_steps_discarded"] == summary["updates_lost"] == 0


def test_a_disk_that_refuses_beside_a_death_does_not_end_the_run(coordinator):
    made = coordinator(slow_config())

    @ray.remote(num_cpus=0)
    def refuse():
        raise OSError("no space left")

    class Refused:
        seconds, told, reference = 0.0, False, refuse.remote()

        def wait(self, seconds):
            return ray.wait([self.reference], timeout=seconds)[0]

        def advance(self, ready):
            return bool(ready) and result_of(self.reference, "learner")

    made.parts.checkpoints.saving = Refused()
    made.parts.checkpoints.settle()  # as a recovery does first
    assert made.parts.checkpoints.saving is None
    assert made.run.recorder.counters["checkpoints_failed"] == 1
    assert made.run.unsaved


@pytest.mark.parametrize("hangs", ["begin_checkpoint", "commit_checkpoint"])
def test_a_store_that_hangs_holds_up_nobody(hangs, coordinator, tmp_path, monkeypatch, capsys):
    made = coordinator(slow_config(600, checkpoint=CheckpointConfig(interval=100)))
    monkeypatch.setattr("distributed.saving.SLOW_SECONDS", 0.2)
    answers, original, asked = threading.Event(), getattr(worldloom.runs.run, hangs), []

    def hang(*args):
        asked.append(made.run.limiter.env_steps)
        assert answers.wait(300)
        return original(*args)

    monkeypatch.setattr(worldloom.runs.run, hangs, hang)
    advance, gone_on = made.pace.advance, []

    def advance_and_look(stop):
        advance(stop)
        if asked and made.run.limiter.env_steps >= asked[0] + 250:  # two more checkpoints are due by now
            gone_on.append((len(asked), made.parts.checkpoints.committed))
            answers.set()

    made.pace.advance = advance_and_look
    summary = made.train()
    assert gone_on[0] == (1, 0)
    assert summary["status"] == "completed"
    assert verify(tmp_path) == []
    assert len(asked) >= 3
    assert re.search(r"the checkpoint of step \d+ is still being written after \d+ s", capsys.readouterr().out)


@pytest.mark.slow
def test_a_run_whose_last_checkpoint_cannot_be_written_saves_its_agent(coordinator, tmp_path):
    made = coordinator(slow_config(300, checkpoint=CheckpointConfig(interval=0)))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "rows").symlink_to("/proc")
    summary = made.train()
    assert (summary["status"], summary["checkpoints_failed"]) == ("unsaved", 1)
    (folder,) = tmp_path.glob("rescued-*")
    rescued = load_agent(folder / "agent")
    assert rescued.act(np.zeros((1, 3), np.float32), None, np.ones(1, bool))[0].shape == (1, 1)


@pytest.mark.slow
def test_a_run_may_be_told_to_stop_where_the_disk_refuses(coordinator, tmp_path):
    made = coordinator(slow_config(checkpoint=CheckpointConfig(interval=300, on_error="stop")))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "rows").symlink_to("/proc")
    with pytest.raises(OSError, match=r"no checkpoint could be written at step 3\d\d .*launch.train --resume"):
        made.train()
    assert not list((tmp_path / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_slow_actor_holds_nobody_up(coordinator, tmp_path):
    config = ray_config(
        "OneSlowActor", actors=2, train=TrainConfig(total_steps=1500, learning_starts=100, train_ratio=12)
    )
    runtime = dataclasses.replace(config.runtime, chunk_steps=64, chunk_seconds=0.3)
    made = coordinator(dataclasses.replace(config, runtime=runtime))
    insert, infos = made.parts.inserting.begin, []
    made.parts.inserting.begin = lambda chunk, info: (infos.append(info), insert(chunk, info))
    summary = made.train()
    assert summary["status"] == "completed"
    by_actor = [[info for info in infos if info.key.actor == actor] for actor in (0, 1)]
    pace = sorted(np.median([info.seconds / info.steps for info in each]) for each in by_actor)
    assert pace[1] > 2 * pace[0]  # 10 times on an idle machine
    slow = max(by_actor, key=lambda each: np.median([info.seconds / info.steps for info in each]))
    fast = by_actor[0] if slow is by_actor[1] else by_actor[1]
    assert sum(i.steps for i in fast) > 1.5 * sum(i.steps for i in slow)
    assert np.median([info.seconds for info in slow]) < 0.6  # a collect ends after its time
    assert all(info.version is not None for info in infos[20:])
    newest = read_metrics(tmp_path)
    assert any("weights/staleness_seconds_p95" in line for line in newest)


def test_what_is_too_big_for_the_object_store_is_refused(tmp_path):
    config = matrix_config("dreamerv3", 1)
    config = dataclasses.replace(
        config,
        env=dataclasses.replace(config.env, id="tests.environments:Screen-v0"),
        agent={**config.agent, "batch_size": 2000},
    )
    with pytest.raises(
        RuntimeError, match=r"a batch takes \d+ MiB, but .* object store of 200 MiB.*object_store_memory"
    ):
        train(config, tmp_path)


def test_each_step_of_saving_may_be_the_last(tmp_path, monkeypatch):
    """In process: whatever the last thing that was done, the checkpoint before loads, and the next one is whole."""
    config = dataclasses.replace(
        slow_config(120),
        runtime=RuntimeConfig(kind="inline"),
        checkpoint=CheckpointConfig(interval=20),
    )

    class Died(BaseException):
        pass

    def dies(*args, **kwargs):
        raise Died

    InlineTrainer(config, tmp_path / "run").train()
    whole = newest_checkpoint(tmp_path / "run").name
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, total_steps=160))
    for name in (
        "worldloom.runs.run.begin_checkpoint",
        "worldloom.runs.inline.write_agent",
        "worldloom.runs.rows.write_msgpack",
        "worldloom.runs.rows.ReplayStore.write",
        "worldloom.runs.run.commit_checkpoint",
        "worldloom.manifest.json.dumps",
        "pathlib.Path.replace",
    ):
        trainer = InlineTrainer(longer, tmp_path / "run", resume=True)
        with monkeypatch.context() as patch:
            patch.setattr(name, dies)
            with pytest.raises(Died):
                trainer.train()
        assert newest_checkpoint(tmp_path / "run").name == whole, name
        assert verify(tmp_path / "run") == [], name
    summary = InlineTrainer(longer, tmp_path / "run", resume=True).train()
    assert summary["env_steps"] >= 160
    assert verify(tmp_path / "run") == []
