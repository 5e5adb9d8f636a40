"""Verification of a run's newest checkpoint: the invariants that must hold after every fault."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.files import read_msgpack
from worldloom.manifest import checkpoints, find_damage, read_manifest
from worldloom.types import Array

FLAGS = ("is_first", "terminated", "truncated", "rewards", "actions")


def verify(run_dir: str | os.PathLike[str]) -> list[str]:
    """Return a sentence for each invariant that the newest checkpoint breaks, starting with its name; [] if all hold.

    I1: the reported steps are the steps that replay holds or has evicted. I2: no chunk was accepted twice. I3: rows
    are contiguous: an episode starts only after the end of the one before, an interrupted episode ends truncated, and
    action and reward of a first row are zero. I4: the learner made no more updates than the train ratio allows. I6:
    learner and manifest agree on the number of updates. Before them, every file of the checkpoint is compared with its
    checksum; if one is damaged, only this is returned. Two invariants do not show in files: acting weights are never
    replaced by older ones (I5, see `worldloom.acting.local`), and no process is left running (I7).

    Raises CheckpointError if there is no checkpoint or it cannot be read.
    """
    folder = checkpoints(run_dir)[-1]
    if damage := find_damage(folder, rows=True):
        return [f"damaged: {folder.name}: {text}" for text in damage]
    manifest, learner = read_manifest(folder), read_msgpack(folder / "learner.msgpack")
    shards = [read_msgpack(folder / f"replay-{number}.msgpack") for number in range(len(manifest["rows"]))]
    limiter, counters = manifest["limiter"], manifest["counters"]
    broken = []
    if limiter["env_steps"] != (steps := sum(replay["steps"] for replay in shards)):
        broken.append(f"I1: {limiter['env_steps']:,} steps are reported, but replay accepted {steps:,}.")
    for replay, names in zip(shards, manifest["rows"], strict=True):
        broken += _check_rows(replay, [_read_marks(folder.parent / "rows" / name) for name in names])
    actors = [entry[0] for replay in shards for entry in replay["sequence"]]
    if len(actors) != len(set(actors)):
        broken.append("I2: an actor has two last chunks in replay.")
    broken += _check_ratio(limiter, counters["env_steps_discarded"])
    kept = limiter["updates"] - counters["updates_lost"]
    if learner["updates"] != kept:
        broken.append(f"I6: the learner made {learner['updates']:,} updates, the manifest counts {kept:,}.")
    return broken


def _read_marks(path: Path) -> dict[str, Array]:
    """Read the columns that are checked. Copies, so that the observations are not kept: together they may be large."""
    segment = read_msgpack(path)
    return {name: np.array(segment[name]) for name in (*FLAGS, "origin", "rewards")}


def _check_rows(replay: dict[str, Any], segments: list[dict[str, Array]]) -> list[str]:
    """Return what is broken in the rows of one shard."""
    if not segments:
        return []
    rows = {name: np.concatenate([segment[name] for segment in segments]) for name in (*FLAGS, "origin")}
    rows["file"] = np.repeat(np.arange(len(segments)), [len(segment["rewards"]) for segment in segments])
    broken = []
    held = int((~rows["is_first"]).sum())
    if replay["rows"] <= len(rows["is_first"]) and held != replay["steps"]:  # else some were evicted
        broken.append(f"I1: replay counts {replay['steps']:,} steps, but its rows hold {held:,}.")
    return broken + [f"I3: {text}" for text in _check_episodes(rows)]


def _check_episodes(rows: dict[str, Array]) -> list[str]:
    """Return what is broken where episodes meet, stream by stream. The oldest row may lie within an episode.

    Files are written once: in the last row of a stream in a file, the flag of an episode that was cut short later is
    still missing. It is set when the rows are loaded.
    """
    broken = []
    for origin in np.unique(rows["origin"], axis=0):
        of = np.flatnonzero((rows["origin"] == origin).all(1))
        first, ended = rows["is_first"][of], rows["terminated"][of] | rows["truncated"][of]
        name = f"actor {origin[0]}, environment {origin[1]}"
        together = np.diff(rows["file"][of]) == 0
        if (first[1:] & ~ended[:-1] & together).any():
            broken.append(f"{name}: an episode starts where the one before has no end.")
        if (~first[1:] & ended[:-1]).any():
            broken.append(f"{name}: an episode goes on after its end.")
        if (rows["terminated"][of] & rows["truncated"][of]).any():
            broken.append(f"{name}: a row is both terminated and truncated.")
        if rows["rewards"][of][first].any() or rows["actions"][of][first].any():
            broken.append(f"{name}: a start has an action or a reward.")
    return broken


def _check_ratio(limiter: dict[str, Any], discarded: int) -> list[str]:
    """Check the train ratio; steps that were learned from and then lost with replay also count."""
    steps, starts = limiter["env_steps"] + discarded, limiter["learning_starts"]
    counted = 0 if steps < starts else steps if limiter["pretrain"] else steps - starts
    owed = counted * limiter["train_ratio"] / limiter["replayed_per_update"] + limiter["ahead"]
    if limiter["updates"] > owed + 1:
        return [f"I4: {limiter['updates']:,} updates were made, but the train ratio allows {owed:,.1f}."]
    return []
