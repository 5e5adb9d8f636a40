"""Checkpoints: rows are written once, then the agent, then a manifest; a folder renamed into place makes it valid.

    checkpoints/rows/000000000000-000000005000.msgpack      consecutive rows of replay, shared by checkpoints
    checkpoints/step-000005000/agent/{config.json, model.safetensors}
    checkpoints/step-000005000/{learner.msgpack, replay.msgpack, manifest.json}

A folder without its final name is never picked up, so a crash while saving leaves the previous checkpoint in force.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from worldloom.pretrained import read_description, save_model, save_parameters
from worldloom.training.codec import pack, unpack
from worldloom.training.replay import ReplayBuffer
from worldloom.types import Agent

FORMAT = 1
SEGMENT_BYTES = 256 * 2**20  # rows files are cut at about this size


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or of another kind."""


def checkpoint_folder(run_dir: Path, env_steps: int) -> Path:
    return run_dir / "checkpoints" / f"step-{env_steps:012d}"


def begin_checkpoint(run_dir: Path, env_steps: int) -> Path:
    """An empty folder to save parts into; `commit_checkpoint` makes it valid."""
    partial = checkpoint_folder(run_dir, env_steps).with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def commit_checkpoint(partial: Path, manifest: Mapping[str, Any], keep: int) -> Path:
    """Write the manifest, rename the folder into place, then delete all but the `keep` newest checkpoints."""
    (partial / "manifest.json").write_text(json.dumps({"format": FORMAT, **manifest}, indent=2) + "\n")
    final = partial.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _prune(final.parent, keep)
    return final


def _prune(folder: Path, keep: int) -> None:
    valid = sorted(path.parent for path in folder.glob("step-*/manifest.json") if path.parent.suffix == "")
    for old in valid[:-keep]:
        shutil.rmtree(old)
    wanted = {name for kept in valid[-keep:] for name in read_manifest(kept)["rows"]}
    for path in (folder / "rows").glob("*.msgpack"):
        if path.name not in wanted:
            path.unlink()


def newest_checkpoint(run_dir: str | os.PathLike[str]) -> Path:
    """Raises CheckpointError if the run has none."""
    found = sorted(path.parent for path in Path(run_dir).glob("checkpoints/step-*/manifest.json"))
    found = [path for path in found if path.suffix == ""]
    if not found:
        raise CheckpointError(f"{run_dir} holds no checkpoint. Give the directory of a run that saved one.")
    return found[-1]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises CheckpointError if it is damaged or newer than this library."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{folder} has no readable manifest ({error}). Delete the folder to use the one before."
        ) from error
    if manifest["format"] > FORMAT:
        raise CheckpointError(
            f"{folder} is of format {manifest['format']}, but this version reads up to {FORMAT}. Update WorldLoom."
        )
    return cast(dict[str, Any], manifest)


# The parts; each is written by whoever holds it


def check_finite(modules: Sequence[nn.Module]) -> None:
    """Raises FloatingPointError rather than let parameters be saved that are NaN or infinite."""
    if not all(p.isfinite().all() for module in modules for p in module.parameters()):
        raise FloatingPointError(
            "parameters are NaN or infinite, so no checkpoint was written. Lower the learning rate (agent.lr), or go "
            "on from the last checkpoint with --resume."
        )


def save_agent(folder: Path, agent: Agent) -> None:
    """Raises FloatingPointError rather than save parameters that are NaN or infinite."""
    modules = [agent.world_model, *([] if agent.behaviour is None else [agent.behaviour])]
    check_finite(modules)
    save_model(folder / "agent", agent.describe(), agent.world_model)
    if agent.behaviour is not None:
        save_parameters(folder / "agent" / "behaviour.safetensors", agent.behaviour)
    write_msgpack(folder / "learner.msgpack", agent.state_dict())


def load_agent_state(folder: Path, agent: Agent) -> None:
    """Settings that shape no parameter, such as the learning rate, are the agent's own and may differ.

    Raises CheckpointError if the checkpoint is of another model.
    """
    saved, expected = read_description(folder / "agent"), json.loads(json.dumps(agent.describe()))
    try:
        if {**saved, "config": None} != {**expected, "config": None}:
            raise ValueError("made for another task")
        agent.load_state_dict(read_msgpack(folder / "learner.msgpack"))
    except (RuntimeError, ValueError) as error:  # parameters of other shapes or names
        raise CheckpointError(
            f"{folder} is of another model: {_difference(saved, expected)}. Resume with its own config."
        ) from error


def _difference(saved: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> str:
    parts = []
    for key in sorted(saved.keys() | expected.keys()):
        a, b = saved.get(key), expected.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            parts.append(_difference(a, b, f"{prefix}{key}."))
        elif a != b:
            parts.append(f"{prefix}{key} is {a!r} there, {b!r} here")
    return "; ".join(part for part in parts if part)


class ReplayStore:
    """Writes replay's rows once each, into files of consecutive rows named by their numbers."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "checkpoints" / "rows"
        self._saved: list[tuple[int, int]] = []

    def save(self, folder: Path, replay: ReplayBuffer, exact: bool = False) -> list[str]:
        """The names of the files that hold every row still in replay.

        Columns that an agent writes back change after their rows were saved; exact: they are saved whole each time.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        end = replay.accepted().rows
        oldest = end - len(replay)
        self._saved = [(first, last) for first, last in self._saved if last > oldest]
        begin = max(self._saved[-1][1] if self._saved else oldest, oldest)
        step = max(SEGMENT_BYTES // (replay.nbytes // replay.capacity), 1)
        for first in range(begin, end, step):
            last = min(first + step, end)
            write_msgpack(self._folder / self._name(first, last), replay.rows_between(first, last))
            self._saved.append((first, last))
        write_msgpack(folder / "replay.msgpack", replay.state_dict())
        if exact and replay.extra_columns:
            write_msgpack(folder / "columns.msgpack", replay.rows_between(oldest, end, replay.extra_columns))
        return [self._name(*segment) for segment in self._saved]

    def load(self, folder: Path, replay: ReplayBuffer) -> None:
        """Fill `replay` from a checkpoint. Raises CheckpointError, naming the file that is missing or damaged."""
        names = read_manifest(folder)["rows"]
        segments = [read_msgpack(self._folder / name) for name in names]
        try:
            replay.load_state_dict(read_msgpack(folder / "replay.msgpack"), segments)
            if (folder / "columns.msgpack").is_file():
                replay.fill_columns(read_msgpack(folder / "columns.msgpack"))
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        self._saved = [cast(tuple[int, int], tuple(int(n) for n in Path(name).stem.split("-"))) for name in names]

    @staticmethod
    def _name(first: int, last: int) -> str:
        return f"{first:012d}-{last:012d}.msgpack"


def write_msgpack(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(pack(value))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_msgpack(path: Path) -> Any:
    try:
        return unpack(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. Delete its checkpoint to use the one before."
        ) from error
