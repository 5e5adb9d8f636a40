"""The record of a run: what its files say about it, for the commands that list runs and show their status."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.claim import LOCK, SILENT_SECONDS, holder_of, silence
from launch.places import small_files
from worldloom.locations import is_remote
from worldloom.manifest import checkpoint_folders
from worldloom.report.page import read_metrics
from worldloom.runs.lease import writer_of

QUIET_SECONDS = 600.0  # after so long without new metrics, a run without a summary counts as silent


@dataclass(frozen=True)
class Record:
    """Holds what a run has written about itself."""

    run: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]  # of metrics.jsonl
    state: str  # running, died, completed and so on, with who runs it
    checkpoints: list[str]  # names, oldest first
    updated: float  # when metrics were last written: seconds since 1970

    @property
    def steps(self) -> int:
        return int(self.lines[-1]["env_steps"]) if self.lines else 0

    @property
    def total_steps(self) -> int:
        return int(self.config["train"]["total_steps"])

    def last(self, key: str) -> dict[str, Any]:
        """Return the last line of metrics with this key; {} if there is none."""
        return next((line for line in reversed(self.lines) if key in line), {})


def read_record(run: Path) -> Record:
    """Read the record of a run. Raises FileNotFoundError if there is no run."""
    with small_files(run) as folder:
        saved, metrics = folder / "config.yaml", folder / "metrics.jsonl"
        if not saved.is_file() or not metrics.is_file():
            raise FileNotFoundError(f"{run} lacks config.yaml or metrics.jsonl, expected the directory of a run.")
        return Record(
            run,
            yaml.safe_load(saved.read_text()),
            read_metrics(folder),
            _remote_state(run, folder) if is_remote(run) else _state(run),
            [path.name for path in checkpoint_folders(run)],
            (run / "metrics.jsonl").stat().st_mtime,
        )


def _summary(folder: Path) -> str | None:
    """Return the status in summary.json, None without a summary."""
    path = folder / "summary.json"
    return str(json.loads(path.read_text())["status"]) if path.is_file() else None


def _state(run: Path) -> str:
    """Return whether the run goes on, or how it ended: as summary.json says, unless the run went on after it."""
    holder, summary, metrics = holder_of(run), run / "summary.json", run / "metrics.jsonl"
    begun = max(metrics.stat().st_mtime, holder.started if holder else 0.0)
    if summary.is_file() and summary.stat().st_mtime >= begun:
        return str(_summary(run))
    if holder:
        quiet = silence(run, holder)
        if quiet < SILENT_SECONDS:
            return f"running ({holder.describe()})"
        how = "is gone" if quiet == float("inf") else f"gave no sign of life for {quiet / 60:.1f} minutes"
        return f"died: {holder.describe()}, {how}; go on with --resume"
    if (run / LOCK).exists():
        return "stopped before its end; go on with --resume"
    quiet = time.time() - metrics.stat().st_mtime  # a program other than launch.train runs it
    if quiet > QUIET_SECONDS:
        return f"no new metrics for {quiet / 60:.0f} minutes; if the run was killed, go on with --resume"
    return "running"


def _remote_state(run: Path, folder: Path) -> str:
    """Return whether a run at a URL goes on, or how it ended: who writes to it holds a lease."""
    writer = writer_of(run)
    if writer is None:
        return _summary(folder) or "stopped before its end; go on with --resume"
    if writer.gone() or time.time() - writer.beat > QUIET_SECONDS / 2:
        return f"died: {writer.describe()}; go on with --resume"
    return f"running ({writer.describe()})"
