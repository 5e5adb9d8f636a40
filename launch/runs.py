"""What the commands that look at a run have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from worldloom.envs import EnvironmentFailed, VectorEnv
from worldloom.envs.suites import AtariConfig, DMCConfig
from worldloom.pretrained import CheckpointError
from worldloom.runs.build import make_run_env
from worldloom.runs.config import EnvConfig

FAILURES = (ValueError, TypeError, OSError, CheckpointError, EnvironmentFailed)  # told in a sentence


def env_config(run_dir: Path) -> EnvConfig:
    """The environment of a run. Raises FileNotFoundError without its config.yaml."""
    saved = run_dir / "config.yaml"
    if not saved.is_file():
        raise FileNotFoundError(f"{run_dir} holds no config.yaml, expected the directory of a run.")
    fields: dict[str, Any] = yaml.safe_load(saved.read_text())["env"]
    return EnvConfig(**{**fields, "atari": AtariConfig(**fields["atari"]), "dmc": DMCConfig(**fields["dmc"])})


def run_envs(env: EnvConfig, count: int, seed: int, video: bool = False) -> VectorEnv:
    """video: with frames to render."""
    return make_run_env(env, count, seed, "rgb_array" if video else None)
