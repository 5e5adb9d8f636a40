"""Checkpoints: rows are written once, then the agent, then a manifest; renaming the folder makes it valid.

    checkpoints/rows/0-000000000000-000000005000.msgpack    consecutive rows of a replay shard, shared by checkpoints
    checkpoints/step-000000005000/agent/{config.json, model.safetensors}
    checkpoints/step-000000005000/{learner.msgpack, replay-0.msgpack, manifest.json}

A folder without its final name is never loaded, so after a crash while saving the previous checkpoint is the newest.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worldloom.files import PARTIAL, CheckpointError
from worldloom.manifest import checkpoints, newest_checkpoint, read_manifest, write_manifest

logger = logging.getLogger(__name__)

DAMAGED = ".damaged"  # suffix of checkpoints that a resume passed over


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
    """Write the manifest, rename the folder into place, then delete all but the `keep` newest checkpoints.

    Raises OSError, also if files of the checkpoint are gone."""
    missing = [name for name in manifest["files"] if not (partial / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)} of the checkpoint were deleted while it was written")
    write_manifest(partial, manifest)
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
    valid = checkpoints(folder.parent)
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


def set_aside_newer(checkpoint: Path) -> None:
    """Rename checkpoints that are newer than the one that a run goes on from, which are damaged, to NAME.damaged; else
    they would count as the newest for ever."""
    for folder in checkpoints(checkpoint.parent.parent):
        if folder > checkpoint:
            aside = folder.with_suffix(DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def check_shards(folder: Path, manifest: Mapping[str, Any], shards: int) -> None:
    """Raise CheckpointError for another number of shards, because rows stay in the shard of their env actor."""
    if (saved := len(manifest["rows"])) != shards:
        through = "" if saved == 1 else " --runtime.kind ray"
        raise CheckpointError(
            f"{folder} has {saved} replay shards, expected {shards}. Go on with{through} --replay.shards {saved}."
        )
