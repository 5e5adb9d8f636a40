"""The earlier part of a run that --resume goes on with: its saved config, and how the new one differs."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from launch.places import in_ray_job, run_place, storage
from worldloom.locations import find, is_file, read_bytes, remove_file, remove_folder
from worldloom.manifest import MANIFEST, checkpoint_folders
from worldloom.report.boards import flat
from worldloom.runs.checkpoint import drop_partial
from worldloom.runs.config import RunConfig
from worldloom.runs.home import Home

RESUME = ("always", "auto", "never")
SAME = ("algorithm", "env.", "start.")  # what a run keeps to its end
FREE = ("storage", "env.num_envs")  # of these, what may change, or says nothing about the run


@dataclass(frozen=True)
class Asked:
    """Holds what the command line says about the run itself, before the configuration is read."""

    run_dir: str | None
    name: str | None
    storage: str | None
    resume: str

    def place(self, default_name: str) -> Path:
        """Return the folder or URL of the run. Raises ValueError if both a directory and a name are given."""
        if self.run_dir and self.name:
            raise ValueError(f"--run-dir is {self.run_dir!r} and --name is {self.name!r}, expected one of them.")
        if self.run_dir:
            return run_place(self.run_dir, self.storage)
        name = self.name or default_name
        if name != Path(name).name:
            raise ValueError(f"--name is {name!r}, expected a name without slashes. Give a folder as --run-dir.")
        return storage(self.storage) / name


def read_asked(argv: Sequence[str]) -> Asked:
    """Read the arguments about the run itself; `storage` may also come from a configuration file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--run-dir", "--run_dir", dest="run_dir")
    parser.add_argument("--name")
    parser.add_argument("--storage")
    parser.add_argument("--resume", nargs="?", const="always", choices=RESUME)
    parser.add_argument("--config", action="append", default=[])
    try:
        known, _ = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    configured = [_storage_in(file) for file in known.config]
    place = known.storage or next(filter(None, reversed(configured)), None)
    return Asked(known.run_dir, known.name, place, known.resume or ("auto" if in_ray_job() else "never"))


def _storage_in(file: str) -> str | None:
    try:
        content = yaml.safe_load(Path(file).read_text())
    except (OSError, yaml.YAMLError):  # the parser of the whole configuration says what is wrong
        return None
    return content.get("storage") if isinstance(content, dict) else None


def saved_config(asked: Asked) -> Path | None:
    """Return config.yaml of the run to go on with; None if a run is to begin.

    Raises ValueError if --resume names no run that has begun.
    """
    if asked.resume == "never":
        return None
    named = asked.run_dir or asked.name
    run = asked.place("") if named else None
    if run is not None and is_file(run / "config.yaml"):
        return run / "config.yaml" if asked.resume == "always" or checkpoint_folders(run) else None
    if asked.resume == "auto":
        return None
    found = "none was given" if run is None else f"{run} holds no config.yaml"
    raise ValueError(f"--resume needs the --run-dir or --name of an earlier run, but {found}.")


def check_unused(home: Home, resume: str) -> None:
    """Raise ValueError if a run lies there. With auto, what an attempt left that saved nothing is removed."""
    run, metrics = home.root, home.root / "metrics.jsonl"
    if checkpoint_folders(run) or (resume != "auto" and (_bytes(metrics) or find(run, "checkpoints"))):
        raise ValueError(
            f"{run} already holds a run. Go on with it by --resume, or choose another --run-dir or --name."
        )
    if _bytes(metrics):
        print(f"an earlier attempt in {run} ended before its first checkpoint: the run begins again", flush=True)
        for place in {home.root, home.dir}:  # of a URL, the second holds copies
            remove_file(place / "metrics.jsonl")
            remove_folder(place / "tensorboard")
    drop_partial(run)


def _bytes(path: Path) -> int:
    return path.stat().st_size if is_file(path) else 0


def is_complete(run: Path, config: RunConfig) -> bool:
    """Return True if the run has ended, and the configuration asks for no further step."""
    try:
        summary = json.loads(read_bytes(run / "summary.json"))
        steps = json.loads(read_bytes(checkpoint_folders(run)[-1] / MANIFEST))["limiter"]["env_steps"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return bool(summary.get("status") == "completed" and steps >= config.train.total_steps)


def changes(saved: RunConfig, new: RunConfig) -> list[str]:
    """Return "KEY: OLD -> NEW" for each field that differs. Raises ValueError for fields that a run keeps."""
    before, after = flat(dataclasses.asdict(saved)), flat(dataclasses.asdict(new))
    differing = [key for key in {**before, **after} if before.get(key) != after.get(key) and key not in FREE]
    for key in differing:
        if key.startswith(SAME):
            raise ValueError(
                f"{key} is {after.get(key)!r}, but {before.get(key)!r} in this run. Go on without it, or begin another "
                "run."
            )
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in differing]
