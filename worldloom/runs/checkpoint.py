"""Checkpoints: rows are written once, then the agent, then a manifest; renaming the folder makes it valid.

    checkpoints/rows/0-000000000000-000000005000.msgpack    consecutive rows of a replay shard, shared by checkpoints
    checkpoints/step-000000005000/agent/{config.json, model.safetensors}
    checkpoints/step-000000005000/{learner.msgpack, replay-0.msgpack, manifest.json}

A folder without its final name is never loaded, so after a crash while saving the previous checkpoint is the newest.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from worldloom.encoding import pack, unpack
from worldloom.pretrained import CheckpointError, newest_checkpoint, read_description, save_described, save_parameters
from worldloom.replay.buffer import ReplayBuffer
from worldloom.types import Agent, Array

logger = logging.getLogger(__name__)

FORMAT = 2  # version 1 had no shards
PARTIAL = ".partial"  # suffix of folders and files that are not complete
ZLIB_MARK = b"x"  # first byte of data that zlib compressed; a msgpack mapping never starts with it
SEGMENT_BYTES = 256 * 2**20  # approximate size of a file of rows


def checkpoint_folder(run_dir: Path, env_steps: int) -> Path:
    return run_dir / "checkpoints" / f"step-{env_steps:012d}"


def begin_checkpoint(run_dir: Path, env_steps: int) -> Path:
    """Make an empty folder to save parts into; `commit_checkpoint` makes it valid."""
    partial = checkpoint_folder(run_dir, env_steps).with_suffix(PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def drop_partial(run_dir: Path) -> None:
    """Remove checkpoints that were not written completely."""
    for partial in run_dir.glob(f"checkpoints/step-*{PARTIAL}"):
        shutil.rmtree(partial, ignore_errors=True)


def commit_checkpoint(partial: Path, manifest: Mapping[str, Any], keep: int) -> Path:
    """Write the manifest, rename the folder into place, then delete all but the `keep` newest checkpoints."""
    with (partial / "manifest.json").open("w") as file:
        file.write(json.dumps({"format": FORMAT, **manifest}, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    final, before = partial.with_suffix(""), partial.with_suffix(".old")
    if final.exists():  # a checkpoint of the same step
        shutil.rmtree(before, ignore_errors=True)
        final.rename(before)
    partial.rename(final)
    shutil.rmtree(before, ignore_errors=True)
    _prune(final.parent, keep)
    return final


def _prune(folder: Path, keep: int) -> None:
    """Delete old checkpoints and rows files that no kept one uses; none of these while a kept manifest is damaged."""
    valid = sorted(path.parent for path in folder.glob("step-*/manifest.json") if path.parent.suffix == "")
    for old in valid[:-keep]:
        shutil.rmtree(old)
    try:
        wanted = {name for kept in valid[-keep:] for shard in read_manifest(kept)["rows"] for name in shard}
    except CheckpointError as error:
        logger.warning("rows files are kept until an earlier checkpoint is deleted: %s", error)
        return
    for path in (folder / "rows").glob("*.msgpack"):
        if path.name not in wanted:
            path.unlink()


def checkpoint_to_resume(run_dir: str | os.PathLike[str], shards: int) -> Path:
    """Return the newest checkpoint. Raises CheckpointError if there is none, or if its number of shards differs."""
    folder = newest_checkpoint(run_dir)
    check_shards(folder, read_manifest(folder), shards)
    return folder


def check_shards(folder: Path, manifest: Mapping[str, Any], shards: int) -> None:
    """Raise CheckpointError for another number of shards, because rows stay in the shard of their env actor."""
    if (saved := len(manifest["rows"])) != shards:
        through = "" if saved == 1 else " --runtime.kind ray"
        raise CheckpointError(
            f"{folder} has {saved} replay shards, expected {shards}. Go on with{through} --replay.shards {saved}."
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest. Raises CheckpointError if it is damaged or of another format."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if not isinstance(manifest["format"], int) or not {"rows", "limiter"} <= manifest.keys():
            raise ValueError("it lacks format, rows or limiter")
    except (OSError, ValueError, KeyError, TypeError) as error:  # not JSON, not text, or other JSON
        raise CheckpointError(
            f"{folder} has no readable manifest ({error}). Delete the folder to use the checkpoint before it."
        ) from error
    if manifest["format"] != FORMAT:
        remedy = "Update WorldLoom" if manifest["format"] > FORMAT else "Go on with the version that wrote it"
        raise CheckpointError(f"{folder} is of format {manifest['format']}, but this version reads {FORMAT}. {remedy}.")
    return cast(dict[str, Any], manifest)


# The parts; each is written by the process that holds it


def check_finite(modules: Sequence[nn.Module]) -> None:
    """Raise FloatingPointError if parameters are NaN or infinite, so that they are not saved."""
    if not all(p.isfinite().all() for module in modules for p in module.parameters()):
        raise FloatingPointError(
            "parameters are NaN or infinite, so no checkpoint was written. Lower the learning rate (agent.lr), or go "
            "on from the last checkpoint with --resume."
        )


@dataclass(frozen=True)
class AgentSnapshot:
    """The agent's part of a checkpoint."""

    description: dict[str, Any]
    model: Mapping[str, torch.Tensor]
    behaviour: Mapping[str, torch.Tensor] | None
    state: Mapping[str, Any]


def take_agent(agent: Agent) -> AgentSnapshot:
    """Return views of the agent's state. Raises FloatingPointError if parameters are NaN or infinite."""
    behaviour = agent.behaviour
    check_finite([agent.world_model, *([] if behaviour is None else [behaviour])])
    own = None if behaviour is None else behaviour.state_dict()
    return AgentSnapshot(agent.describe(), agent.world_model.state_dict(), own, agent.state_dict())


def copy_agent(agent: Agent) -> AgentSnapshot:
    """Copy the agent's state to CPU memory, for `write_agent` while the agent goes on learning.

    Raises the errors of `take_agent`."""
    taken, copies = take_agent(agent), {}

    def copied(value: Any) -> Any:
        if isinstance(value, torch.Tensor):  # a parameter may occur several times
            key = (value.data_ptr(), tuple(value.shape), value.dtype)
            if key not in copies:
                copies[key] = value.detach().to("cpu", copy=True)
            return copies[key]
        if isinstance(value, Mapping):
            return {name: copied(part) for name, part in value.items()}
        return [copied(part) for part in value] if isinstance(value, list | tuple) else value

    behaviour = copied(taken.behaviour) if taken.behaviour is not None else None
    return AgentSnapshot(taken.description, copied(taken.model), behaviour, copied(taken.state))


def write_agent(folder: Path, snapshot: AgentSnapshot) -> None:
    save_described(folder / "agent", snapshot.description, snapshot.model)
    if snapshot.behaviour is not None:
        save_parameters(folder / "agent" / "behaviour.safetensors", snapshot.behaviour)
    write_msgpack(folder / "learner.msgpack", snapshot.state)


def rescue_agent(run_dir: Path, snapshot: AgentSnapshot) -> Path | None:
    """Save the agent alone, after a checkpoint could not be written: into the run directory, else into the system's
    temporary folder. Return the folder for `load_agent`, or None if neither takes it."""
    for parent in (str(run_dir), None):  # None: the temporary folder
        try:
            folder = Path(tempfile.mkdtemp(prefix="rescued-" if parent else f"worldloom-{run_dir.name}-", dir=parent))
            write_agent(folder, snapshot)
            return folder / "agent"
        except OSError as error:
            logger.warning("the agent could not be saved in %s: %s", parent or tempfile.gettempdir(), error)
    return None


def load_agent_state(folder: Path, agent: Agent) -> None:
    """Load the agent's state. Settings that change no parameter shape, such as the learning rate, may differ.

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


@dataclass(frozen=True)
class ReplaySnapshot:
    """Replay's part of a checkpoint. Its rows may be read lazily; then replay must not change meanwhile."""

    oldest: int  # number of the oldest row that is held
    segments: Iterable[tuple[int, int, dict[str, Array]]]  # first and last row number (exclusive), columns
    state: dict[str, Any]
    extra: dict[str, Array] | None  # columns that the agent writes back, for every row


class ReplayStore:
    """Writes each row of replay once, into files of consecutive rows that are named by row numbers."""

    def __init__(self, run_dir: Path, shard: int = 0, shards: int = 1, compress: bool = False) -> None:
        self._folder = run_dir / "checkpoints" / "rows"
        self._shard, self._shards, self._compress = shard, shards, compress
        self._saved: list[tuple[int, int, str]] = []  # first and last row, file

    def save(self, folder: Path, replay: ReplayBuffer, exact: bool = False) -> list[str]:
        """Snapshot and write at once, without a copy of everything; replay must not change meanwhile."""
        return self.write(folder, self._take(replay, exact))

    def snapshot(self, replay: ReplayBuffer, exact: bool = False) -> ReplaySnapshot:
        """Copy the rows that were not saved yet, for `write`; replay may change afterwards.

        Columns that an agent writes back change after their rows were saved; exact: save them for all rows each time.
        """
        taken = self._take(replay, exact)
        return replace(taken, segments=list(taken.segments))

    def _take(self, replay: ReplayBuffer, exact: bool) -> ReplaySnapshot:
        end = replay.accepted().rows
        oldest = end - len(replay)
        begin = max(self._saved[-1][1] if self._saved else oldest, oldest)
        step = max(SEGMENT_BYTES // (replay.nbytes // replay.capacity), 1)
        cuts = [(first, min(first + step, end)) for first in range(begin, end, step)]
        extra = replay.rows_between(oldest, end, replay.extra_columns) if exact and replay.extra_columns else None
        segments = ((*cut, replay.rows_between(*cut)) for cut in cuts)
        return ReplaySnapshot(oldest, segments, replay.state_dict(), extra)

    def write(self, folder: Path, snapshot: ReplaySnapshot) -> list[str]:
        """Write a snapshot; return the files that hold its rows. Raises OSError; files written before it stay valid."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._saved = [(first, last, name) for first, last, name in self._saved if last > snapshot.oldest]
        for first, last, columns in snapshot.segments:
            name = self._free_name(first, last)
            write_msgpack(self._folder / name, columns, self._compress)
            self._saved.append((first, last, name))
        write_msgpack(folder / f"replay-{self._shard}.msgpack", snapshot.state)
        if snapshot.extra is not None:
            write_msgpack(folder / f"columns-{self._shard}.msgpack", snapshot.extra, self._compress)
        return [name for *_, name in self._saved]

    def load(self, folder: Path, replay: ReplayBuffer) -> int:
        """Fill `replay` from a checkpoint; return how many rows are lost with files that are missing or damaged.

        Raises CheckpointError if it is of another replay, or if the state of replay or all rows cannot be read.
        """
        manifest = read_manifest(folder)
        check_shards(folder, manifest, self._shards)
        names: list[str] = manifest["rows"][self._shard]
        damaged = self._damaged(names)
        if damaged and len(damaged) == len(names):
            raise CheckpointError(
                f"{folder}: its files of rows {', '.join(names)} cannot be read. Delete it to use the one before it."
            )
        counts = {name: last - first for name in names for first, last in [self._numbers(name)]}
        lost = sum(counts[name] for name in damaged)
        segments = (None if name in damaged else read_msgpack(self._folder / name) for name in names)
        try:
            state = read_msgpack(folder / f"replay-{self._shard}.msgpack")
            replay.load_state_dict(state, segments, sum(counts.values()) - lost, lost)
            if not lost and (columns := folder / f"columns-{self._shard}.msgpack").is_file():
                replay.fill_columns(read_msgpack(columns))
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        self._saved = [] if lost else [(*self._numbers(name), name) for name in names]
        return lost

    def _damaged(self, names: Sequence[str]) -> set[str]:
        """Return the files that are missing or cannot be read. Only one is read at a time, because together they may be
        as large as replay."""
        found = set()
        for name in names:
            try:
                read_msgpack(self._folder / name)
            except CheckpointError as error:
                first, last = self._numbers(name)
                logger.warning("%d rows of replay are lost: %s", last - first, error)
                found.add(name)
        return found

    def _free_name(self, first: int, last: int) -> str:
        """Return a file name that is free, because another checkpoint may need the existing files."""
        attempts = (
            f"{self._shard}-{first:012d}-{last:012d}{again}.msgpack"
            for again in chain([""], map("-{}".format, count(1)))
        )
        return next(name for name in attempts if not (self._folder / name).exists())

    @staticmethod
    def _numbers(name: str) -> tuple[int, int]:
        _, first, last, *_ = name.removesuffix(".msgpack").split("-")
        return int(first), int(last)


def write_msgpack(path: Path, value: Any, compress: bool = False) -> None:
    """Write a file completely or not at all. compress: losslessly (zlib); `read_msgpack` detects it."""
    partial = path.with_suffix(PARTIAL)
    packed = zlib.compress(pack(value), level=1) if compress else pack(value)
    try:
        with partial.open("wb") as file:
            file.write(packed)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read_msgpack(path: Path) -> Any:
    """Read a file. Raises CheckpointError, naming the file, if it is missing, cut short or of another kind."""
    try:
        data = path.read_bytes()
        return unpack(zlib.decompress(data) if data[:1] == ZLIB_MARK else data)
    except (OSError, ValueError, zlib.error) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. Delete its checkpoint to use the one before it."
        ) from error
