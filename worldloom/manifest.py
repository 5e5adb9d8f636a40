"""The manifest of a checkpoint, which makes it valid and knows the checksum of every file; the newest valid one."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from worldloom.files import CheckpointError, checksum, checksum_of
from worldloom.locations import Location, find, join, locate, read_bytes, write_bytes

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 3
NAME = re.compile(r"step-(\d+)(?:-(\d+))?")
READABLE = (2, 3)  # 1 had no shards; 2 has no checksums, and stores the starts of windows


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest with a checksum of itself. Its files: path relative to `folder` -> checksum."""
    manifest = {"format": FORMAT, **content}
    write_bytes(folder / MANIFEST, _dump({**manifest, "checksum": checksum(_dump(manifest).encode())}).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a run's checkpoint. Raises CheckpointError if it is damaged or of another format."""
    manifest = _read(folder)
    try:
        if not isinstance(manifest["limiter"], dict):
            raise ValueError("its limiter is of another kind")
        for first, last in (row_numbers(name) for shard in manifest["rows"] for name in shard):
            if first >= last:
                raise ValueError(f"a file of rows holds rows {first} to {last}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(folder, error) from error
    return manifest


def _read(folder: Path) -> dict[str, Any]:
    """Read a manifest and compare its own checksum."""
    try:
        manifest = json.loads(read_bytes(folder / MANIFEST).decode())
        written, version = manifest.pop("checksum", None), manifest["format"]
        if written not in (None, checksum(_dump(manifest).encode())):
            raise ValueError("its checksum differs")
        if not isinstance(version, int):
            raise ValueError(f"its format is {version!r}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # not JSON, text, or other JSON
        raise _damaged(folder, error) from error
    if version not in READABLE:
        remedy = "Update WorldLoom" if version > FORMAT else "Go on with the version that wrote it"
        raise CheckpointError(
            f"{folder} is of format {version}, but this version reads {' and '.join(map(str, READABLE))}. {remedy}."
        )
    return cast(dict[str, Any], manifest)


def _damaged(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{folder} has no readable {MANIFEST} ({error}). Delete the folder to use the checkpoint before it."
    )


def row_numbers(name: str) -> tuple[int, int]:
    """Return the first and last row number (exclusive) in the name of a file of rows."""
    _, first, last, *_ = name.removesuffix(".msgpack").split("-")
    return int(first), int(last)


def checkpoint_folders(run_dir: Location) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first: those with a manifest."""
    found = [path.parent for path in find(locate(run_dir), f"checkpoints/step-*/{MANIFEST}")]
    return sorted((path for path in found if NAME.fullmatch(path.name)), key=age)


def checkpoints(run_dir: Location) -> list[Path]:
    """Return `checkpoint_folders`. Raises CheckpointError if there is none."""
    if not (found := checkpoint_folders(run_dir)):
        raise CheckpointError(f"{run_dir} holds no checkpoint. Give the directory of a run that saved one.")
    return found


def age(folder: Path) -> tuple[int, int]:
    """Return what sorts checkpoints by age: environment steps, and the number of the attempt at these steps."""
    found = NAME.fullmatch(folder.name)
    return (int(found[1]), int(found[2] or 0)) if found else (-1, 0)


def find_damage(folder: Path, rows: bool = False) -> list[str]:
    """Return a sentence for each file of a checkpoint that is missing or changed; rows: the files of rows too, which
    are large, and whose damage costs these rows only. Raises CheckpointError if the manifest cannot be read."""
    damage = []
    for name, written in _read(folder).get("files", {}).items():
        if name.startswith("..") and not rows:
            continue
        try:
            if (found := checksum_of(join(folder, name))) != written:
                damage.append(f"{name} has checksum {found}, but {written} when it was written")
        except OSError as error:
            damage.append(f"{name} cannot be read: {error}")
    return damage


def newest_checkpoint(run_dir: Location) -> Path:
    """Return the newest checkpoint of a run whose files, rows apart, are as they were written; warn of newer ones.

    Raises CheckpointError if there is none, or if the newest is of another format.
    """
    found, damage = checkpoints(run_dir), ""
    for folder in reversed(found):
        try:
            read_manifest(folder)
            damage = "; ".join(find_damage(folder))
        except CheckpointError as error:
            if error.__cause__ is None:  # not damaged, but of another format
                raise
            damage = f"{MANIFEST}: {error.__cause__}"
        if not damage:
            return folder
        logger.warning("%s is damaged (%s), so the checkpoint before it is used", folder, damage)
    raise CheckpointError(f"{run_dir} holds no whole checkpoint; {found[0].name} is damaged, too: {damage}.")


def _dump(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2) + "\n"
