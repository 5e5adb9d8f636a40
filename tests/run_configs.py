"""Configurations of tiny runs, on environments whose right answers are known."""

import dataclasses

from worldloom.runs.config import (
    CheckpointConfig,
    EnvConfig,
    EvalConfig,
    LogConfig,
    ReplayConfig,
    RunConfig,
    RuntimeConfig,
    TrainConfig,
)

TINY_AGENT = {
    "encoder_dim": 16, "mlp_dim": 16, "latent_dim": 16, "batch_size": 8, "num_samples": 16, "num_elites": 4,
    "num_pi_trajs": 2, "iterations": 2,
}  # fmt: skip

TINY_DREAMER = {
    "deter": 32, "hidden": 8, "units": 8, "classes": 4, "depth": 2, "stoch": 4, "blocks": 4, "batch_size": 4,
    "batch_length": 8, "imagination_length": 3,
}  # fmt: skip

TINY_YAML = """
algorithm: tdmpc2:1m
agent: {encoder_dim: 16, mlp_dim: 16, latent_dim: 16, batch_size: 8, num_samples: 16, num_elites: 4,
        num_pi_trajs: 2, iterations: 2, lr: 3e-4}
env: {id: "tests.environments:Counting-v0", num_envs: 2}
replay: {capacity: 10_000}
train: {total_steps: 300, learning_starts: 100, train_ratio: 12}
runtime: {kind: inline}
eval: {interval: 0, episodes: 2}
"""


def tiny_config(env_id="tests.environments:Counting-v0", **sections):
    parts = {
        "algorithm": "tdmpc2:1m",
        "agent": TINY_AGENT,
        "env": EnvConfig(id=env_id, num_envs=2),
        "replay": ReplayConfig(capacity=2000),
        "train": TrainConfig(total_steps=300, learning_starts=100, train_ratio=12),
        "runtime": RuntimeConfig(kind="inline"),
        "eval": EvalConfig(interval=0, episodes=3),
        "checkpoint": CheckpointConfig(interval=0),
        "log": LogConfig(interval=50),
    }
    return RunConfig(**{**parts, **sections})


def dreamer_config(env="Counting", **sections):
    """4 windows of 8 trained rows an update, an update every 8 steps."""
    parts = {
        "algorithm": "dreamerv3:size1m",
        "agent": TINY_DREAMER,
        "env": EnvConfig(id=f"tests.environments:{env}-v0", num_envs=2),
        "train": TrainConfig(total_steps=1000, learning_starts=100, train_ratio=4),
    }
    return tiny_config(**{**parts, **sections})


TINY_STORM = {
    "hidden": 32, "heads": 4, "max_length": 16, "stem_channels": 2, "stoch": 4, "classes": 4, "units": 16,
    "batch_size": 4, "batch_length": 6, "context": 3, "acting_context": 5, "imagination_length": 4,
    "imagination_starts": 12,
}  # fmt: skip

TINY_DIAMOND = {
    "cond": 16, "channels": 8, "reward_cond": 16, "reward_channels": 8, "reward_lstm": 16, "policy_channels": 8,
    "policy_lstm": 16, "horizon": 3, "batch_size": 2,
}  # fmt: skip


def ne_config(**sections):
    """DreamerV3 with NE-Dreamer's loss: 4 windows of 8 trained rows, an update every second step; from images."""
    train = TrainConfig(total_steps=300, learning_starts=100, train_ratio=16)
    agent = {**TINY_DREAMER, "representation": "ne"}
    return dreamer_config("Screen", **{"agent": agent, "train": train, **sections})


def r2dreamer_config(**sections):
    """The same with R2-Dreamer's loss."""
    return ne_config(**{"agent": {**TINY_DREAMER, "representation": "r2dreamer"}, **sections})


def storm_config(**sections):
    """4 windows of 6 trained rows an update, an update every second step; from images [3, 64, 64]."""
    parts = {
        "algorithm": "storm:tiny",
        "agent": TINY_STORM,
        "env": EnvConfig(id="tests.environments:Screen-v0", num_envs=2),
        "train": TrainConfig(total_steps=300, learning_starts=100, train_ratio=12),
    }
    return tiny_config(**{**parts, **sections})


def diamond_config(**sections):
    """2 windows of 7 rows an update, an update every fourth step, the warm-up included; from images [3, 16, 16]."""
    parts = {
        "algorithm": "diamond:tiny",
        "agent": TINY_DIAMOND,
        "env": EnvConfig(id="tests.environments:Screen-v0", num_envs=2, image_size=16),
        "train": TrainConfig(total_steps=300, learning_starts=100, train_ratio=3.5),
    }
    return tiny_config(**{**parts, **sections})


def diverging(config):
    """The same run with a learning rate that makes every parameter infinite."""
    return dataclasses.replace(config, agent={**config.agent, "lr": 1e30, "warmup": 0})
