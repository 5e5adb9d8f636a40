"""The manifest of a checkpoint, which makes it valid, and the newest valid checkpoint of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

from worldloom.files import CheckpointError

FORMAT = 2  # version 1 had no shards


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


def newest_checkpoint(run_dir: str | os.PathLike[str]) -> Path:
    """Return the newest complete checkpoint of a run. Raises CheckpointError if there is none."""
    found = sorted(path.parent for path in Path(run_dir).glob("checkpoints/step-*/manifest.json"))
    found = [path for path in found if path.suffix == ""]
    if not found:
        raise CheckpointError(f"{run_dir} holds no checkpoint. Give the directory of a run that saved one.")
    return found[-1]
