"""Lockstep: the Ray runtime gives bit for bit what the in-process trainer gives, and a resumed run goes on exactly."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch

from distributed.coordinator import train
from tests.run_configs import diamond_config, dreamer_config, storm_config, tiny_config
from worldloom.files import read_msgpack
from worldloom.manifest import newest_checkpoint
from worldloom.report.page import read_metrics
from worldloom.runs.config import CheckpointConfig, EvalConfig, RuntimeConfig, TrainConfig
from worldloom.runs.inline import InlineTrainer

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.usefixtures("small_cluster")]


MAKERS = {"tdmpc2": tiny_config, "dreamerv3": dreamer_config, "storm": storm_config, "diamond": diamond_config}
RATIOS = {"tdmpc2": 12, "dreamerv3": 8, "storm": 12, "diamond": 3.5}


def config(family, steps=300, **runtime):
    parts = {
        "train": TrainConfig(total_steps=steps, learning_starts=100, train_ratio=RATIOS[family], seed=5),
        "eval": EvalConfig(interval=100, episodes=3),
        "checkpoint": CheckpointConfig(interval=100, keep=9),
        "runtime": RuntimeConfig(**{"kind": "ray", "sync": True, "env_actors": 1, "learner_threads": 1, **runtime}),
    }
    return MAKERS[family](**parts)


def inline(made, run_dir, resume=False):
    run_dir.mkdir(exist_ok=True)
    made = dataclasses.replace(made, runtime=dataclasses.replace(made.runtime, kind="inline"))
    return InlineTrainer(made, run_dir, resume).train()


def outcome(run_dir, made):
    """Everything that two equal runs share: learner and generators, every row of replay, losses, evaluations."""
    folder = newest_checkpoint(run_dir)
    replay = InlineTrainer(made, run_dir, resume=True).replay
    metrics = [
        {name: value for name, value in line.items() if name.startswith(("learner/", "eval/", "episode/"))}
        for line in read_metrics(run_dir)
    ]
    summary = json.loads((run_dir / "summary.json").read_text())
    counts = {
        name: summary[name] for name in ("env_steps", "updates", "episodes", "eval_return_mean", "eval_return_std")
    }
    saved, learner = read_msgpack(folder / "replay-0.msgpack"), read_msgpack(folder / "learner.msgpack")
    learner.pop("acting_generator")  # on Ray the learner does not act
    return {
        "learner": learner, "rows": replay.rows_between(0, replay.accepted().rows),
        "draws": saved["rng"], "metrics": metrics, "counts": counts,
    }  # fmt: skip


def assert_equal(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b, err_msg=path)
    else:
        assert a == b, path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Gives the outcome of a family's run in one process that never stopped."""
    torch.set_num_threads(1)

    @functools.cache
    def made(family):
        folder = tmp_path_factory.mktemp(family)
        inline(config(family), folder)
        return outcome(folder, config(family))

    return made


@pytest.mark.parametrize(
    ("family", "actors"),
    [
        pytest.param("tdmpc2", 0, marks=pytest.mark.slow),
        ("tdmpc2", 1),
        pytest.param("dreamerv3", 0, marks=pytest.mark.slow),
        ("dreamerv3", 1),
        pytest.param("storm", 1, marks=pytest.mark.slow),
        pytest.param("diamond", 1, marks=pytest.mark.slow),
    ],
)
def test_lockstep_on_ray_is_bit_for_bit_the_in_process_trainer(family, actors, whole, tmp_path):
    made = config(family, env_actors=actors)
    train(made, tmp_path)
    first, second = outcome(tmp_path, made), whole(family)
    assert len(first["rows"]["rewards"]) > 300
    assert first["counts"]["updates"] >= 50
    assert sum("eval/return_mean" in line for line in first["metrics"]) == 3
    assert_equal(first, second)


@pytest.mark.parametrize(
    ("first", "second", "family"),
    [
        ("inline", "inline", "tdmpc2"),
        ("inline", "inline", "dreamerv3"),
        pytest.param("ray", "ray", "tdmpc2", marks=pytest.mark.slow),
        ("ray", "ray", "dreamerv3"),
        ("inline", "ray", "tdmpc2"),
        pytest.param("inline", "ray", "dreamerv3", marks=pytest.mark.slow),
        pytest.param("ray", "inline", "tdmpc2", marks=pytest.mark.slow),
        ("ray", "inline", "dreamerv3"),
        pytest.param("inline", "inline", "storm", marks=pytest.mark.slow),
        pytest.param("inline", "inline", "diamond", marks=pytest.mark.slow),
        pytest.param("ray", "ray", "storm", marks=pytest.mark.slow),
        pytest.param("ray", "ray", "diamond", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(family, first, second, whole, tmp_path):
    runs = {"inline": inline, "ray": train}
    runs[first](config(family, steps=200), tmp_path)
    for folder in (tmp_path / "checkpoints").glob("step-*"):
        steps = int(folder.name.removeprefix("step-"))
        if steps >= 200:  # as if it had been killed on the way: the checkpoint at 100 is the last
            (folder / "manifest.json").unlink()
    runs[second](config(family), tmp_path, True)
    parts, never_stopped = outcome(tmp_path, config(family)), dict(whole(family))
    for each in (never_stopped, parts):
        each.pop("metrics")  # of the parts, those of the stretch that was lost stand there twice
    assert_equal(never_stopped, parts)


@pytest.mark.slow
def test_several_env_actors_in_lockstep_repeat_themselves(tmp_path):
    made = config("tdmpc2", env_actors=2)
    train(made, tmp_path / "a")
    train(made, tmp_path / "b")
    assert_equal(outcome(tmp_path / "a", made), outcome(tmp_path / "b", made))
