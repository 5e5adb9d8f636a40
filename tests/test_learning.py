"""Tests that agents learn: a tiny task here, the presets of small tasks in the slow tests.

The quick tests of learning are the first two here, each family in a loop of acting, replay and updates, and those that
end in "beats chance", which learn from random rows: TD-MPC2 and DreamerV3 in `test_testing.py`, STORM and DIAMOND in
their folders. Each takes a fixed seed and one thread, so that it gives the same numbers again.
"""

import json

import pytest

from distributed.coordinator import train
from examples.judge_rally import right_frames
from launch.arguments import run_config, run_parser
from tests.run_configs import tiny_config
from worldloom import load_agent
from worldloom.runs.build import make_run_env
from worldloom.runs.config import EnvConfig, EvalConfig, ReplayConfig, RuntimeConfig, TrainConfig
from worldloom.runs.inline import InlineTrainer

LEARNER = {
    "encoder_dim": 32, "mlp_dim": 32, "latent_dim": 32, "batch_size": 64, "num_samples": 64, "num_elites": 8,
    "num_pi_trajs": 8, "iterations": 3, "lr": 1e-3,
}  # fmt: skip


def test_tdmpc2_learns_to_copy_its_observation(tmp_path):
    config = tiny_config(
        agent=LEARNER,
        env=EnvConfig(id="tests.environments:Target-v0", num_envs=4),
        train=TrainConfig(total_steps=800, learning_starts=200, train_ratio=192),
        runtime=RuntimeConfig(kind="inline", learner_threads=1),
        eval=EvalConfig(interval=0, episodes=10),
    )
    summary = InlineTrainer(config, tmp_path).train()
    assert summary["eval_return_mean"] > 15  # of 20; acting at random gives 6.7


DOORS = {  # tiny networks, env steps and train ratio, with which each family learns them in less than a minute
    "dreamerv3:size1m": (
        {"deter": 64, "hidden": 32, "units": 32, "stoch": 8, "classes": 4, "depth": 4, "blocks": 4, "batch_size": 8,
         "batch_length": 16, "lr": 1e-3, "warmup": 50, "entropy_scale": 3e-3, "imagination_length": 5},
        1300, 64,
    ),
    "storm:tiny": (
        {"hidden": 32, "heads": 4, "max_length": 16, "stem_channels": 4, "stoch": 8, "classes": 4, "units": 32,
         "batch_size": 8, "batch_length": 12, "context": 3, "acting_context": 5, "imagination_length": 4,
         "imagination_starts": 48, "world_lr": 1e-3, "agent_lr": 1e-3, "entropy_scale": 3e-3},
        1700, 48,
    ),
    "diamond:tiny": (
        {"cond": 16, "channels": 8, "context": 2, "reward_cond": 16, "reward_channels": 8, "reward_lstm": 32,
         "policy_lstm": 32, "horizon": 4, "lr": 2e-3, "warmup": 20},
        400, 48,
    ),
}  # fmt: skip


@pytest.mark.timeout(600)
@pytest.mark.parametrize("preset", DOORS)
def test_families_learn_from_images_in_imagination_what_pays_two_steps_later(tmp_path, preset):
    agent, steps, ratio = DOORS[preset]
    side = None if preset.startswith("diamond") else 48
    config = tiny_config(
        algorithm=preset,
        agent=agent,
        env=EnvConfig(id="tests.environments:Doors-v0", num_envs=4, image_size=side),
        replay=ReplayConfig(capacity=5000),
        train=TrainConfig(total_steps=steps, learning_starts=200, train_ratio=ratio),
        runtime=RuntimeConfig(kind="inline", learner_threads=1),
        eval=EvalConfig(interval=0, episodes=40),
    )
    # Of 1; at random it is 0. A policy that drifts, as with a model that does not read actions, gets up to 0.7.
    assert InlineTrainer(config, tmp_path).train()["eval_return_mean"] > 0.85


def preset_of(name, *more):
    parser = run_parser("test", "")
    return run_config(parser, parser.parse_args(["--config", f"configs/{name}.yaml", *more]))


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("kind", ["inline", pytest.param("ray", marks=pytest.mark.ray)])
@pytest.mark.parametrize(
    ("preset", "enough"),
    [
        ("tdmpc2_pendulum", -250),
        ("tdmpc2_inverted_pendulum", 900),
        ("tdmpc2_cartpole", 450),
        ("dreamerv3_cartpole", 400),
    ],
)
def test_presets_learn_their_tasks(no_cluster, tmp_path, kind, preset, enough):
    config = preset_of(preset, "--runtime.kind", kind)
    if kind == "inline":
        InlineTrainer(config, tmp_path).train()
    else:
        train(config, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["eval_return_mean"] >= enough


R2DREAMER = ("--agent.representation", "r2dreamer", "--agent.barlow_scale", "1.5")
IMAGES = {
    "dreamerv3_catch": ("dreamerv3_catch", (), 4.5),  # of 5; acting at random gives -1.0
    "r2dreamer": ("dreamerv3_catch", R2DREAMER, 4.5),
    "storm_catch": ("storm_catch", (), 4.5),
    "diamond_rally": ("diamond_rally", (), 8.0),  # of 15; acting at random gives -0.5
}


@pytest.mark.slow
@pytest.mark.timeout(4800)
@pytest.mark.parametrize("case", IMAGES)
def test_presets_learn_their_tasks_from_images(tmp_path, case):
    preset, more, enough = IMAGES[case]
    config = preset_of(preset, "--runtime.kind", "inline", *more)
    assert InlineTrainer(config, tmp_path).train()["eval_return_mean"] >= enough
    if preset == "diamond_rally":
        right = right_frames(load_agent(tmp_path), lambda seed: make_run_env(config.env, 1, seed))
        assert right.mean() >= 0.8


SHORT = {
    "env.num_envs": "2", "train.total_steps": "80", "train.learning_starts": "64", "train.train_ratio": "24",
    "train.compile": "false", "runtime.kind": "inline", "runtime.learner_threads": "1", "eval.interval": "72",
    "eval.episodes": "1", "checkpoint.interval": "72", "log.interval": "40",
}  # fmt: skip


@pytest.mark.parametrize(
    "preset",
    [  # the pages' commands start the first two, with other sizes
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("dreamerv3_catch", "storm_catch")),
        "diamond_rally",
    ],
)
def test_presets_of_images_start_learn_and_resume(tmp_path, preset):
    """Tests that a slip in a preset is not found after half an hour."""
    words = [word for name, value in SHORT.items() for word in (f"--{name}", value)]
    InlineTrainer(preset_of(preset, *words), tmp_path).train()
    longer = preset_of(preset, *words, "--train.total_steps", "92")
    summary = InlineTrainer(longer, tmp_path, resume=True).train()
    assert (summary["status"], summary["env_steps"]) == ("completed", 92)
    assert summary["updates"] >= 2


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(2400)
def test_two_learners_learn_what_one_does(no_cluster, tmp_path):
    summary = train(preset_of("tdmpc2_pendulum", "--runtime.learners", "2"), tmp_path)
    assert summary["learner_restarts"] == 0
    assert summary["eval_return_mean"] >= -250
