"""Does a run's last checkpoint tell the truth: the invariants that every fault must leave standing."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from worldloom.pretrained import newest_checkpoint
from worldloom.runs.checkpoint import read_manifest, read_msgpack
from worldloom.types import Array

FLAGS = ("is_first", "terminated", "truncated", "rewards", "actions")


def verify(run_dir: str | os.PathLike[str]) -> list[str]:
    """What is broken in the newest checkpoint, a sentence each that begins with the invariant's name; [] if all hold.

    I1 the steps that are reported are the steps that replay holds or has evicted. I2 no chunk was accepted twice. I3
    rows are contiguous: every start has a seam before it, an interrupted episode ends truncated, and actions and
    rewards of starts are zero. I4 no more was delivered to the learner than the train ratio allows. I6 learner and
    manifest agree on their updates. No file can tell of the other two: that weights never go back (I5;
    `worldloom.acting.local` refuses), and that nothing is left running (I7).

    Raises CheckpointError if there is no checkpoint or it cannot be read.
    """
    folder = newest_checkpoint(run_dir)
    manifest, learner = read_manifest(folder), read_msgpack(folder / "learner.msgpack")
    shards = [read_msgpack(folder / f"replay-{number}.msgpack") for number in range(len(manifest["rows"]))]
    limiter, counters = manifest["limiter"], manifest["counters"]
    broken = []
    if limiter["env_steps"] != (steps := sum(replay["steps"] for replay in shards)):
        broken.append(f"I1: {limiter['env_steps']:,} steps are reported, but replay accepted {steps:,}.")
    for replay, names in zip(shards, manifest["rows"], strict=True):
        broken += _rows(replay, [read_msgpack(folder.parent / "rows" / name) for name in names])
    actors = [entry[0] for replay in shards for entry in replay["sequence"]]
    if len(actors) != len(set(actors)):
        broken.append("I2: an actor has two last chunks in replay.")
    broken += _ratio(limiter, counters["env_steps_discarded"])
    kept = limiter["updates"] - counters["updates_lost"]
    if learner["updates"] != kept:
        broken.append(f"I6: the learner made {learner['updates']:,} updates, the manifest counts {kept:,}.")
    return broken


def _rows(replay: dict[str, Any], segments: list[dict[str, Array]]) -> list[str]:
    """Of one shard."""
    if not segments:
        return []
    rows = {name: np.concatenate([segment[name] for segment in segments]) for name in (*FLAGS, "origin")}
    rows["file"] = np.repeat(np.arange(len(segments)), [len(segment["rewards"]) for segment in segments])
    broken = []
    held = int((~rows["is_first"]).sum())
    if replay["rows"] <= len(rows["is_first"]) and held != replay["steps"]:  # else some were evicted
        broken.append(f"I1: replay counts {replay['steps']:,} steps, but its rows hold {held:,}.")
    return broken + [f"I3: {text}" for text in _seams(rows)]


def _seams(rows: dict[str, Array]) -> list[str]:
    """Each stream by itself, in order of age; the oldest row of a ring that wrapped may lie within an episode.

    Files are written once: the last row of a stream in one does not know yet that its episode was to be cut short. It
    is marked when the rows are loaded.
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


def _ratio(limiter: dict[str, Any], discarded: int) -> list[str]:
    """Steps that were learned from and then lost with replay count as well."""
    steps, starts = limiter["env_steps"] + discarded, limiter["learning_starts"]
    counted = 0 if steps < starts else steps if limiter["pretrain"] else steps - starts
    owed = counted * limiter["train_ratio"] / limiter["replayed_per_update"] + limiter["ahead"]
    if limiter["updates"] > owed + 1:
        return [f"I4: {limiter['updates']:,} updates were made, but the train ratio allows {owed:,.1f}."]
    return []
