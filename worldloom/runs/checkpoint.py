"""Checkpoints: rows are written once, then the agent, then a manifest, which makes the checkpoint valid.

    checkpoints/rows/0-000000000000-000000005000.msgpack    consecutive rows of a replay shard, shared by checkpoints
    checkpoints/step-000000005000/agent/{config.json, model.safetensors}
    checkpoints/step-000000005000/{learner.msgpack, replay-0.msgpack, manifest.json}

A folder without a manifest is never loaded, so after a crash while saving the previous checkpoint is the newest.
Nothing is renamed, because object stores cannot.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

from worldloom.files import CheckpointError
from worldloom.locations import (
    PARTIAL,
    Location,
    files_below,
    find,
    is_file,
    make_folder,
    read_bytes,
    remove_file,
    remove_folder,
    write_bytes,
)
from worldloom.manifest import (
    MANIFEST,
    age,
    checkpoint_folders,
    checkpoints,
    newest_checkpoint,
    read_manifest,
    write_manifest,
)

logger = logging.getLogger(__name__)

DAMAGED = "manifest.damaged"  # what the manifest of a checkpoint is called that a resume passed over


def begin_checkpoint(run_dir: Path, env_steps: int) -> Path:
    """Make an empty folder to save parts into; `commit_checkpoint` makes it valid."""
    folder = run_dir / "checkpoints"
    taken = {path.name for path in find(folder, f"step-{env_steps:012d}*")}
    names = (f"step-{env_steps:012d}{again}" for again in chain([""], map("-{}".format, count(1))))
    free = folder / next(name for name in names if name not in taken)
    make_folder(free)
    return free


def drop_partial(run_dir: Path) -> None:
    """Remove checkpoints that were not written completely."""
    for path in find(run_dir / "checkpoints", "step-*"):
        set_aside = is_file(path / DAMAGED) or path.suffix not in ("", PARTIAL)  # the suffix: by earlier versions
        if not set_aside and (path.suffix == PARTIAL or not is_file(path / MANIFEST)):
            remove_folder(path)


def commit_checkpoint(folder: Path, manifest: Mapping[str, Any], keep: int) -> None:
    """Write the manifest, then delete all but the `keep` newest checkpoints. If that fails, the next tries again.

    Raises OSError if the checkpoint cannot be written, or files of it are gone."""
    present = {*files_below(folder), *(f"../rows/{path.name}" for path in find(folder.parent / "rows", "*.msgpack"))}
    missing = [name for name in manifest["files"] if name not in present]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)} of the checkpoint were deleted while it was written")
    write_manifest(folder, manifest)
    try:
        _prune(folder.parent, keep)
    except OSError as error:  # the new checkpoint stands
        logger.warning("earlier checkpoints cannot be deleted (%s); the next checkpoint tries again.", error)


def _prune(folder: Path, keep: int) -> None:
    """Delete old checkpoints and rows files that no kept one uses; none of these while a kept manifest is damaged."""
    valid = checkpoints(folder.parent)
    for old in valid[:-keep]:
        remove_file(old / MANIFEST)  # first, so that what is half deleted is not loaded
        remove_folder(old)
    try:
        wanted = {name for kept in valid[-keep:] for shard in read_manifest(kept)["rows"] for name in shard}
    except CheckpointError as error:
        logger.warning("rows files are kept until an earlier checkpoint is deleted: %s", error)
        return
    for path in find(folder / "rows", "*.msgpack"):
        if path.name not in wanted:
            remove_file(path)


def checkpoint_to_resume(run_dir: Location, shards: int) -> Path:
    """Return the newest checkpoint. Raises CheckpointError if there is none, or if its number of shards differs."""
    folder = newest_checkpoint(run_dir)
    check_shards(folder, read_manifest(folder), shards)
    return folder


def tidy(checkpoint: Path) -> None:
    """Make the checkpoint that a run goes on from the newest: newer ones, which are damaged, lose their manifest (it is
    called manifest.damaged then), and those that were not written completely are removed."""
    run_dir = checkpoint.parent.parent
    for folder in checkpoint_folders(run_dir):
        if age(folder) > age(checkpoint):
            write_bytes(folder / DAMAGED, read_bytes(folder / MANIFEST))
            remove_file(folder / MANIFEST)
    drop_partial(run_dir)


def check_shards(folder: Path, manifest: Mapping[str, Any], shards: int) -> None:
    """Raise CheckpointError for another number of shards, because rows stay in the shard of their env actor."""
    if (saved := len(manifest["rows"])) != shards:
        through = "" if saved == 1 else " --runtime.kind ray"
        raise CheckpointError(
            f"{folder} has {saved} replay shards, expected {shards}. Go on with{through} --replay.shards {saved}."
        )
