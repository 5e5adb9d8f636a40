"""The Ray runtime on one small cluster, with a tiny agent on environments whose right answers are known."""

import contextlib
import dataclasses
import os
import signal
import threading
import time
import urllib.request

import pytest
import ray

from distributed import free_running
from distributed.coordinator import Coordinator, train
from tests.distributed.ray_runs import accepted, complete_each_checkpoint, matrix_config, ray_config, run, slow_config
from tests.run_configs import diverging, dreamer_config
from worldloom.envs import EnvironmentFailed
from worldloom.files import CheckpointError
from worldloom.manifest import newest_checkpoint
from worldloom.runs.config import CheckpointConfig, EvalConfig, ReplayConfig, RuntimeConfig, TrainConfig
from worldloom.runs.inline import InlineTrainer

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.usefixtures("small_cluster")]


@pytest.mark.parametrize(
    "env", [pytest.param("Counting", marks=pytest.mark.slow), "Screen", pytest.param("Mixed", marks=pytest.mark.slow)]
)
def test_dreamerv3_trains_on_ray_and_writes_its_latents_back(env, tmp_path):
    runtime = RuntimeConfig(kind="ray", env_actors=2, chunk_steps=8, publish_interval=5, learner_threads=1)
    steps = TrainConfig(total_steps=500, learning_starts=100, train_ratio=4)
    config = dreamer_config(env, runtime=runtime, train=steps)
    summary, accepted = run(config, tmp_path)
    assert steps.total_steps <= summary["env_steps"] == accepted.steps
    assert summary["updates"] == (summary["env_steps"] - 100) // 8
    batch = InlineTrainer(config, tmp_path, resume=True).replay.draw(100)
    assert batch["deter"][~batch["is_first"][:, :1]].any()


def test_a_nan_in_the_learner_ends_the_run_with_the_last_checkpoint(coordinator, tmp_path):
    config = dreamer_config(
        train=TrainConfig(total_steps=2000, learning_starts=300, train_ratio=4),
        checkpoint=CheckpointConfig(interval=100),
        runtime=RuntimeConfig(kind="ray", env_actors=1, chunk_steps=8, publish_interval=5, learner_threads=1),
    )
    made = coordinator(diverging(config))
    complete_each_checkpoint(made)
    with pytest.raises(FloatingPointError, match="--resume"):
        made.train()
    saved = newest_checkpoint(tmp_path)
    InlineTrainer(config, tmp_path, resume=True)
    assert 300 <= int(saved.name.removeprefix("step-")) <= 320  # the last one due before the first bad update


def test_a_killed_env_actor_is_replaced_and_nothing_accepted_is_lost(tmp_path):
    summary, accepted = run(ray_config("Suicidal", actors=2), tmp_path)
    assert summary["status"] == "completed"
    assert summary["actor_restarts"] == 1
    assert summary["env_steps"] == accepted.steps >= 600
    assert 0 < summary["env_steps_discarded"] <= 16
    assert summary["train_ratio_actual"] == pytest.approx(12, rel=0.01)


@pytest.mark.slow
def test_an_env_actor_killed_from_outside_is_replaced(tmp_path):
    coordinator = Coordinator(ray_config("SlowCounting", actors=2), tmp_path)

    def kill():
        deadline = time.monotonic() + 120
        while coordinator.run.limiter.env_steps < 300 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(victim, signal.SIGKILL)

    try:
        coordinator.start(resume=False)
        victim = ray.get(coordinator.parts.collecting.collectors[1].handle.pid.remote())
        killer = threading.Thread(target=kill)
        killer.start()
        summary = coordinator.train()
        killer.join()
        counts = accepted(coordinator)
    finally:
        coordinator.close()
    assert summary["actor_restarts"] == 1
    assert summary["env_steps"] == counts.steps >= 600


def test_a_hanging_environment_is_replaced_after_the_time_out(tmp_path):
    config = ray_config("Hanging", actors=2)
    config = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, collect_timeout=10.0))
    summary, accepted = run(config, tmp_path)
    assert summary["actor_restarts"] == 1
    assert summary["env_steps"] == accepted.steps >= 600


@pytest.mark.parametrize(
    ("env", "error"),
    [
        ("AlwaysFaulty", "the simulator exploded"),
        pytest.param("AlwaysInterrupting", "raised KeyboardInterrupt", marks=pytest.mark.slow),
    ],
)
def test_an_environment_that_always_fails_ends_the_run_with_its_traceback(env, error, tmp_path):
    with pytest.raises(EnvironmentFailed, match=error) as failure:
        train(ray_config(env, actors=2), tmp_path)  # which fails in both
    assert "environments.py" in str(failure.value.__cause__)
    assert newest_checkpoint(tmp_path).is_dir()  # what was accepted is kept for --resume


def test_a_ratio_so_low_that_a_round_of_chunks_owes_no_update_is_kept(tmp_path):
    config = ray_config(train=TrainConfig(total_steps=400, learning_starts=100, train_ratio=0.2))
    summary, accepted = run(config, tmp_path)
    assert summary["env_steps"] == accepted.steps >= 400
    assert summary["updates"] == int(summary["env_steps"] * 0.2 / 24) >= 3


def test_learning_waits_for_a_complete_window(tmp_path):
    config = matrix_config("dreamerv3", actors=1, chunk_steps=3)
    crowded = dataclasses.replace(config.env, num_envs=16)  # the first chunks hold fewer rows of each than a window
    train = TrainConfig(total_steps=400, learning_starts=20, train_ratio=4)
    summary, accepted = run(dataclasses.replace(config, env=crowded, train=train), tmp_path)
    assert summary["status"] == "completed"
    assert summary["updates"] == (accepted.steps - 20) * 4 // 32


def test_collects_grow_where_more_chunks_arrive_than_the_driver_is_to_see(tmp_path, monkeypatch):
    monkeypatch.setattr(free_running, "CHUNKS_PER_SECOND", 5)
    config = slow_config(2000, checkpoint=CheckpointConfig(interval=0))
    warm_up = TrainConfig(total_steps=2000, learning_starts=1999, train_ratio=12)
    coordinator = Coordinator(dataclasses.replace(config, train=warm_up), tmp_path)
    seen, begin = [], coordinator.parts.inserting.begin
    coordinator.parts.inserting.begin = lambda chunk, info: (seen.append(info.steps), begin(chunk, info))
    try:
        coordinator.start(resume=False)
        coordinator.train()
    finally:
        coordinator.close()
    asked = 2 * 8  # in a chunk, of which some rows start an episode
    assert seen[0] <= asked
    assert max(seen) > 2 * asked


@pytest.mark.slow
def test_an_environment_that_always_kills_its_process_ends_the_run(tmp_path):
    with pytest.raises(RuntimeError, match="was lost 6 times in a row"):
        train(ray_config("Killer", runtime=RuntimeConfig(env_actors=1, chunk_steps=64, learner_threads=1)), tmp_path)


def test_actors_have_names_and_metrics_while_they_run_and_are_gone_afterwards(tmp_path):
    steps = TrainConfig(total_steps=200, learning_starts=100, train_ratio=12)
    coordinator = Coordinator(ray_config(actors=2, train=steps), tmp_path / "exported")
    try:
        coordinator.start(resume=False)
        names = {entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)}
        assert {"learner", "replay/0", "env/000", "env/001"} <= names
        coordinator.train()
        line = exported("ray_worldloom_rate_train_ratio{", 'run="exported"')
        assert 'role="coordinator"' in line
        assert 0 <= float(line.rsplit(" ", 1)[1]) < 12.5  # of some log line: the exporter lags behind
    finally:
        coordinator.close()
    deadline = time.monotonic() + 60
    while ray.util.list_named_actors(all_namespaces=True) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.util.list_named_actors(all_namespaces=True) == []


def exported(*words):
    """The first line of the cluster's metrics that holds all of these words, once there is one."""
    port, deadline = ray.nodes()[0]["MetricsExportPort"], time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            found = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
            for line in found.splitlines():
                if all(word in line for word in words):
                    return line
        time.sleep(0.2)
    raise AssertionError(f"no line of the metrics holds {words}")


@pytest.mark.slow
def test_resume_on_ray_goes_on_with_replay_and_counters(tmp_path):
    config = ray_config(
        actors=1, eval=EvalConfig(interval=400, episodes=2), checkpoint=CheckpointConfig(interval=300, keep=2)
    )
    first, accepted = run(config, tmp_path)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, total_steps=1200))
    second, after = run(longer, tmp_path, resume=True)
    assert second["env_steps"] == after.steps >= 1200
    assert after.rows > accepted.rows
    assert after.chunks > accepted.chunks
    assert second["updates"] == second["env_steps"] // 2
    assert second["episodes"] > first["episodes"]
    with pytest.raises(CheckpointError, match="another model"):
        train(dataclasses.replace(longer, algorithm="tdmpc2:5m"), tmp_path, resume=True)


def test_a_replay_that_does_not_fit_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(MemoryError, match=r"Lower replay.capacity"):
        train(ray_config(replay=ReplayConfig(capacity=10**12)), tmp_path)
