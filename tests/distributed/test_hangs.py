"""Parts that hang: others go on at once, a silent part is named on screen, and past its bound it is replaced."""

import dataclasses
import os
import re
import signal
import threading
import time
from itertools import pairwise

import pytest
import ray

from distributed import collecting, watching
from distributed.coordinator import Coordinator
from tests.distributed.ray_runs import accepted, check, handle_of, ray_config, slow_config
from worldloom.envs import EnvironmentFailed
from worldloom.manifest import newest_checkpoint
from worldloom.report.page import read_metrics
from worldloom.runs.config import CheckpointConfig, EvalConfig, LogConfig, RuntimeConfig, TrainConfig
from worldloom.runs.verify import verify

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.usefixtures("small_cluster")]


@pytest.fixture
def quick_to_see(monkeypatch):
    """Silence is named on screen after a second, in place of ten."""
    monkeypatch.setattr(watching, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(watching, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(collecting, "SILENT_SECONDS", 1.0)


def runtime(**fields):
    return RuntimeConfig(**{"env_actors": 2, "chunk_steps": 8, "publish_interval": 5, "learner_threads": 1, **fields})


def freeze_at(made, steps, pid):
    """Stop a process once so many steps are done, with no checkpoint under way."""
    advance, frozen = made.pace.advance, []

    def advance_and_freeze(stop):
        advance(stop)
        if not frozen and made.run.limiter.env_steps >= steps and made.parts.checkpoints.saving is None:
            os.kill(pid, signal.SIGSTOP)
            frozen.append(made.run.limiter.env_steps)

    made.pace.advance = advance_and_freeze
    return frozen


@pytest.mark.parametrize("victim", ["learner", "replay", pytest.param("server", marks=pytest.mark.slow)])
def test_a_frozen_part_is_named_and_then_replaced(victim, quick_to_see, coordinator, tmp_path, capsys):
    acting = {"acting": "server", "acting_server": "actor"} if victim == "server" else {}
    config = slow_config(runtime=runtime(silence_timeout=4.0, collect_timeout=20.0, **acting))
    made = coordinator(config)
    frozen = freeze_at(made, 400, ray.get(handle_of(made, victim).pid.remote()))
    summary = made.train()
    assert frozen
    check(summary, accepted(made), tmp_path, config)
    assert summary["actor_restarts"] == 1
    assert (summary["updates_lost"] > 0) == (victim == "learner")
    name = {"learner": "learner", "replay": "replay/0", "server": "the acting server"}[victim]
    said = capsys.readouterr().out
    assert re.search(rf"{name} has not answered for \d s; it is replaced after 4 s \(runtime.silence_timeout\)", said)
    assert re.search(rf"{name} gave no answer for \d+ s and was ended\.", said)


def test_a_frozen_env_actor_holds_up_nobody_else(quick_to_see, coordinator, tmp_path, capsys):
    config = ray_config(
        "Counting",
        actors=2,
        train=TrainConfig(total_steps=3000, learning_starts=100, train_ratio=0.5),
        runtime=runtime(collect_timeout=8.0),
        log=LogConfig(interval=50),
        checkpoint=CheckpointConfig(interval=500),
    )
    made = coordinator(config)
    collectors = made.parts.collecting.collectors
    while not all(collector.built for collector in collectors):
        made.parts.take_ready(timeout=10)
    pid = ray.get(collectors[1].handle.pid.remote())
    frozen = freeze_at(made, 300, pid)
    ticks, advance = [], made.pace.advance
    launcher, names = made.parts.state.launcher, []
    start = launcher.start
    launcher.start = lambda kind, name, *args, **options: names.append(name) or start(kind, name, *args, **options)

    def noted_advance(stop):
        ticks.append(time.monotonic())
        advance(stop)

    made.pace.advance = noted_advance
    summary = made.train()
    assert frozen
    check(summary, accepted(made), tmp_path, config)
    assert summary["actor_restarts"] == 1
    between = [b - a for a, b in pairwise(ticks)]  # log lines included, one of which took 60 s
    assert max(between) < 5.0
    assert names == [f"env/001-{made.parts.state.incarnation}"]  # Ray frees the old name only after 5 s
    logged = [line["wall_seconds"] for line in read_metrics(tmp_path) if "rate/env_steps_per_second" in line]
    assert len(logged) > 3000 / 50 / 2
    said = capsys.readouterr().out
    assert re.search(r"env/001 has been collecting for \d s without an answer; it is replaced after 8 s", said)
    assert "env/001 gave no answer for 8 s; started again" in said


@pytest.mark.parametrize("actors", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_frozen_replay_stops_collecting_in_the_warm_up_too(actors, coordinator, tmp_path):
    steps = TrainConfig(total_steps=1500, learning_starts=1400, train_ratio=12)
    config = ray_config("Counting", train=steps, runtime=runtime(env_actors=actors, silence_timeout=600.0))
    made = coordinator(config)
    pid = ray.get(handle_of(made, "replay").pid.remote())
    while made.run.limiter.env_steps < 200:
        made.pace.advance(None)
    os.kill(pid, signal.SIGSTOP)
    before, most, deadline = made.run.limiter.env_steps, 0, time.monotonic() + 6
    while time.monotonic() < deadline:
        made.pace.advance(None)
        most = max(most, len(made.parts.inserting.under_way))
    assert 0 < most <= 2 * max(actors, 1)
    assert made.run.limiter.env_steps - before <= 2 * 16 * max(actors, 1)  # acknowledged just before it froze
    os.kill(pid, signal.SIGCONT)
    summary = made.train()
    check(summary, accepted(made), tmp_path, config)
    assert summary["actor_restarts"] == summary["env_steps_discarded"] == 0


@pytest.mark.slow
def test_a_part_that_is_frozen_for_a_while_goes_on(quick_to_see, coordinator, tmp_path, capsys):
    config = slow_config(runtime=runtime(silence_timeout=60.0))
    made = coordinator(config)
    pid = ray.get(handle_of(made, "learner").pid.remote())
    frozen = freeze_at(made, 400, pid)
    goes_on = threading.Timer(5.0, os.kill, (pid, signal.SIGCONT))
    advance = made.pace.advance

    def advance_and_time(stop):
        advance(stop)
        if frozen and goes_on.ident is None:
            goes_on.start()

    made.pace.advance = advance_and_time
    summary = made.train()
    check(summary, accepted(made), tmp_path, config)
    assert frozen
    assert summary["actor_restarts"] == summary["updates_lost"] == 0
    assert "learner answers again after" in capsys.readouterr().out


def test_an_update_that_never_ends_is_ended(hanging_learner, coordinator, tmp_path, capsys):
    config = slow_config(runtime=runtime(env_actors=1, learner_timeout=10.0))
    made = coordinator(config)
    updates = made.run.recorder.updated
    hung = []

    def updated_and_hang(*args):
        updates(*args)
        if not hung and made.run.limiter.updates >= 100 and made.parts.checkpoints.saving is None:
            hung.append(made.parts.learning.learner.hang.remote())

    made.run.recorder.updated = updated_and_hang
    summary = made.train()
    assert hung
    check(summary, accepted(made), tmp_path, config)
    assert summary["actor_restarts"] == 1
    assert "learner was at one call for" in capsys.readouterr().out


@pytest.fixture
def hanging_learner(monkeypatch):
    """A learner with a call that never ends, in its work thread."""
    from distributed import ranks
    from distributed.actors.learner import LearnerActor
    from distributed.actors.pulse import timed

    class Hanging(LearnerActor):
        @timed
        def hang(self):
            while True:
                time.sleep(1)

    monkeypatch.setattr(ranks, "LearnerActor", Hanging)


def test_building_slow_environments_is_not_a_hang(coordinator, tmp_path, capsys):
    config = ray_config(
        "SlowToBuild",
        train=TrainConfig(total_steps=200, learning_starts=100, train_ratio=12),
        eval=EvalConfig(interval=0, episodes=6),
        runtime=runtime(env_actors=1, collect_timeout=10.0, build_timeout=60.0),
    )  # 2 s each: 12 s for the environments that collect, and for those that evaluate
    made = coordinator(dataclasses.replace(config, env=dataclasses.replace(config.env, num_envs=6)))
    summary = made.train()
    assert summary["status"] == "completed"
    assert summary["actor_restarts"] == 0
    assert accepted(made).steps == summary["env_steps"] >= 200
    assert verify(tmp_path) == []


@pytest.mark.slow
def test_an_environment_that_hangs_again_and_again_ends_the_run(monkeypatch, coordinator, tmp_path):
    monkeypatch.setattr(collecting, "HANGS_ALLOWED", 3)
    config = ray_config("OftenHanging", actors=1, runtime=runtime(env_actors=1, collect_timeout=3.0))
    made = coordinator(dataclasses.replace(config, train=dataclasses.replace(config.train, total_steps=100_000)))
    with pytest.raises(EnvironmentFailed, match="env/000 gave no answer 3 times within 90 s, each time for 3 s"):
        made.train()
    assert newest_checkpoint(tmp_path).is_dir()  # what was accepted is kept


def test_two_runs_of_one_name_share_a_cluster(tmp_path):
    config = ray_config(runtime=runtime(env_actors=0))
    runs = [Coordinator(config, tmp_path / folder / "same") for folder in ("a", "b")]
    try:
        begun = time.monotonic()
        for made in runs:
            made.start(resume=False)
        assert time.monotonic() - begun < 90
        names = [entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)]
        assert names.count("learner") == 2
    finally:
        for made in runs:
            made.close()
