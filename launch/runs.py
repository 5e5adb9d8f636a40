"""Functions that the commands share: the directory of a run and its environments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from worldloom.envs import EnvironmentFailed, VectorEnv
from worldloom.envs.suites import AtariConfig, DMCConfig
from worldloom.files import CheckpointError
from worldloom.runs.build import make_run_env
from worldloom.runs.config import EnvConfig

RUNS_VARIABLE = "WORLDLOOM_RUNS"
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it, under this name, for what `ray job submit` starts
FAILURES = (ValueError, TypeError, OSError, CheckpointError, EnvironmentFailed)  # shown without a traceback


def in_ray_job() -> bool:
    return JOB_VARIABLE in os.environ


def runs_folder() -> Path:
    """Return the folder of relative run directories in Ray jobs. Raises ValueError if $WORLDLOOM_RUNS is relative."""
    folder = Path(os.environ.get(RUNS_VARIABLE) or "~/worldloom/runs").expanduser()
    if not folder.is_absolute():
        raise ValueError(f"{RUNS_VARIABLE} is {str(folder)!r}, expected an absolute path.")
    return folder


def run_directory(given: str | os.PathLike[str]) -> Path:
    """Return the directory of the run that the user calls `given`.

    The working directory of a Ray job is a copy of the checkout in Ray's cache. It is a new one after each change of
    the code, and it is deleted when the cache is full. In a job, runs/NAME or NAME is therefore NAME in `runs_folder`.
    """
    path = Path(given)
    if path.is_absolute() or not in_ray_job():
        return path
    return runs_folder() / (path.relative_to("runs") if path.parts[:1] == ("runs",) else path)


def env_config(run_dir: Path) -> EnvConfig:
    """Return the environment config of a run. Raises FileNotFoundError if the run has no config.yaml."""
    saved = run_dir / "config.yaml"
    if not saved.is_file():
        raise FileNotFoundError(f"{run_dir} holds no config.yaml, expected the directory of a run.")
    fields: dict[str, Any] = yaml.safe_load(saved.read_text())["env"]
    return EnvConfig(**{**fields, "atari": AtariConfig(**fields["atari"]), "dmc": DMCConfig(**fields["dmc"])})


def run_envs(env: EnvConfig, count: int, seed: int, video: bool = False) -> VectorEnv:
    """Make `count` environments of a run; video: they can render frames."""
    return make_run_env(env, count, seed, "rgb_array" if video else None)
