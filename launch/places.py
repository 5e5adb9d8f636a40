"""The places of runs, for the commands: the storage, the folder or URL of a run, and its environments."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from worldloom.envs import EnvironmentFailed, VectorEnv
from worldloom.envs.suites import AtariConfig, DMCConfig
from worldloom.files import CheckpointError
from worldloom.locations import is_file, is_remote, locate, read_bytes
from worldloom.runs.build import make_run_env
from worldloom.runs.config import EnvConfig
from worldloom.runs.home import fetch_small_files

STORAGE_VARIABLE = "WORLDLOOM_STORAGE"
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it, under this name, for what `ray job submit` starts
FAILURES = (ValueError, TypeError, OSError, CheckpointError, EnvironmentFailed)  # shown without a traceback


def in_ray_job() -> bool:
    return JOB_VARIABLE in os.environ


def storage(given: str | None = None) -> Path:
    """Return the folder or URL that holds a folder for each run: `given`, else $WORLDLOOM_STORAGE, else runs/.

    The working directory of a Ray job is a copy of the checkout in Ray's cache. It is a new one after each change of
    the code, and it is deleted when the cache is full. In a job, ~/worldloom/runs therefore takes the place of runs/.

    Raises ValueError for a relative folder in a Ray job, or a URL that nothing installed can read.
    """
    default = "~/worldloom/runs" if in_ray_job() else "runs"
    place = locate(given or os.environ.get(STORAGE_VARIABLE) or default)
    if is_remote(place):
        return place
    place = place.expanduser()
    if in_ray_job() and not place.is_absolute():
        name = "storage" if given else STORAGE_VARIABLE
        raise ValueError(f"{name} is {str(place)!r}, expected an absolute path or a URL in a Ray job.")
    return place


def run_place(given: str, of: str | None = None) -> Path:
    """Return the folder or URL of the run that the user calls `given`: a URL, a path, or a name in the storage `of`.

    In a Ray job, NAME and runs/NAME are NAME in the storage; elsewhere, NAME is so if there is no folder of that name.
    """
    place = locate(given)
    if is_remote(place) or place.is_absolute():
        return place
    if in_ray_job():
        return storage(of) / str(place.relative_to("runs") if place.parts[:1] == ("runs",) else place)
    named = storage(of) / given
    return named if not place.exists() and is_file(named / "config.yaml") else place


@contextlib.contextmanager
def small_files(run: Path) -> Iterator[Path]:
    """Give a folder of this machine with the files of a run, less checkpoints: a copy, if the run lies at a URL."""
    if not is_remote(run):
        yield run
        return
    with tempfile.TemporaryDirectory(prefix="worldloom-") as folder:
        fetch_small_files(run, Path(folder) / run.name)
        yield Path(folder) / run.name


def env_config(run: Path) -> EnvConfig:
    """Return the environment config of a run's evaluations. Raises FileNotFoundError if it has no config.yaml."""
    saved = run / "config.yaml"
    if not is_file(saved):
        raise FileNotFoundError(f"{run} holds no config.yaml, expected the directory of a run.")
    fields: dict[str, Any] = yaml.safe_load(read_bytes(saved))["env"]
    saved_env = {**fields, "atari": AtariConfig(**fields["atari"]), "dmc": DMCConfig(**fields["dmc"])}
    return EnvConfig(**saved_env).for_evaluation()


def run_envs(env: EnvConfig, count: int, seed: int, video: bool = False) -> VectorEnv:
    """Make `count` environments of a run; video: they can render frames."""
    return make_run_env(env, count, seed, "rgb_array" if video else None)
