"""That agents learn: a tiny task here, the published presets in the slow tests."""

import dataclasses
import json

import pytest

from distributed.coordinator import train
from launch.arguments import run_config, run_parser
from tests.run_configs import tiny_config
from worldloom.runs.config import EnvConfig, EvalConfig, RuntimeConfig, TrainConfig
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
    parser = run_parser("test", "")
    config = run_config(parser, parser.parse_args(["--config", f"configs/{preset}.yaml"]))
    config = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, kind=kind))
    if kind == "inline":
        InlineTrainer(config, tmp_path).train()
    else:
        train(config, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["eval_return_mean"] >= enough
