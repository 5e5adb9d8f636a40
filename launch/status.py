"""The status command, for runs that go on or have ended: python -m launch.status --run-dir DIR"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from launch.claim import LOCK, SILENT_SECONDS, holder_of, silence
from launch.failures import sentence
from launch.runs import run_directory
from worldloom.files import CheckpointError
from worldloom.report.display import describe_limits
from worldloom.report.page import read_metrics
from worldloom.runs.verify import verify

QUIET_SECONDS = 600.0  # after so long without new metrics, a run without a summary counts as silent


def command_parser() -> ArgumentParser:
    """Return the parser of the command's options."""
    parser = ArgumentParser(prog="launch.status", description="Print the status of a run.")
    parser.add_argument("--run-dir", dest="run_dir", type=str, required=True, help="directory of a run")
    parser.add_argument("--verify", action="store_true", help="also check the newest checkpoint's invariants")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = command_parser().parse_args(argv)
    try:
        run_dir = run_directory(options.run_dir)
        for name, value in status(run_dir):
            print(f"{name:<22}{value}")
        broken = verify(run_dir) if options.verify else []
    except (OSError, ValueError, CheckpointError) as error:
        print(f"launch.status: {sentence(error)}", file=sys.stderr)
        return 1
    if options.verify:
        print("\n".join(f"{'broken':<22}{text}" for text in broken) or f"{'invariants':<22}hold")
    return 1 if broken else 0


def status(run_dir: Path) -> list[tuple[str, str]]:
    """Return the (name, value) pairs to print. Raises FileNotFoundError if there is no run."""
    saved, metrics = run_dir / "config.yaml", run_dir / "metrics.jsonl"
    if not saved.is_file() or not metrics.is_file():
        raise FileNotFoundError(f"{run_dir} lacks config.yaml or metrics.jsonl, expected the directory of a run.")
    config: dict[str, Any] = yaml.safe_load(saved.read_text())
    lines = read_metrics(run_dir)
    logged = next((line for line in reversed(lines) if "rate/train_ratio" in line), {})
    evaluated = [line for line in lines if "eval/return_mean" in line]
    last: dict[str, Any] = lines[-1] if lines else {}
    total, steps = config["train"]["total_steps"], last.get("env_steps", 0)
    shown = [
        ("run", f"{config['algorithm']} on {config['env']['id']}, seed {config['train']['seed']}"),
        ("status", _state(run_dir, metrics)),
        ("steps", f"{steps:,} of {total:,} ({steps / total:.0%})"),
        ("updates", f"{last.get('updates', 0):,}"),
        ("wall time", f"{last.get('wall_seconds', 0) / 60:.1f} min"),
    ]
    for name, key, form in FIGURES:
        if key in logged:
            shown.append((name, form.format(logged[key])))
    if evaluated:
        newest = evaluated[-1]
        mean, std = newest["eval/return_mean"], newest["eval/return_std"]
        shown.append(("evaluation", f"{mean:,.1f} ± {std:,.1f} at step {newest['env_steps']:,}"))
    checkpoints = sorted(path.parent.name for path in run_dir.glob("checkpoints/step-*/manifest.json"))
    shown.append(("checkpoint", checkpoints[-1] if checkpoints else "none yet"))
    if "limited_by" in logged:
        shares = {name.removeprefix("limits/"): logged[name] for name in logged if name.startswith("limits/")}
        shown.append(("limited by", describe_limits(shares) or str(logged["limited_by"])))
    return shown


FIGURES = [
    ("return", "episode/return", "{:,.1f} (mean of the last 20 episodes)"),
    ("environment steps/s", "rate/env_steps_per_second", "{:.1f}"),
    ("updates/s", "rate/updates_per_second", "{:.1f}"),
    ("learner busy", "rate/learner_busy_fraction", "{:.0%}"),
    ("train ratio", "rate/train_ratio", "{:g}"),
    ("staleness p95", "weights/staleness_p95", "{:g} publishes"),
    ("acting batch fill", "acting/batch_fill", "{:.0%}"),
    ("object store used", "plasma/used_fraction", "{:.0%}"),
    ("checkpoint pause", "checkpoint/paused_seconds", "{:.3f} s of learning"),
    ("actor restarts", "count/actor_restarts", "{:g}"),
    ("steps discarded", "count/env_steps_discarded", "{:g}"),
    ("updates lost", "count/updates_lost", "{:g}"),
    ("rows lost", "count/rows_lost", "{:g}"),
    ("checkpoints failed", "count/checkpoints_failed", "{:g}"),
]


def _state(run_dir: Path, metrics: Path) -> str:
    """Return whether the run goes on, or how it ended: as summary.json says, unless the run went on after it."""
    holder, summary = holder_of(run_dir), run_dir / "summary.json"
    begun = max(metrics.stat().st_mtime, holder.started if holder else 0.0)
    if summary.is_file() and summary.stat().st_mtime >= begun:
        return str(json.loads(summary.read_text())["status"])
    if holder:
        quiet = silence(run_dir, holder)
        if quiet < SILENT_SECONDS:
            return f"running ({holder.describe()})"
        how = "is gone" if quiet == float("inf") else f"gave no sign of life for {quiet / 60:.1f} minutes"
        return f"died: {holder.describe()}, {how}; go on with --resume"
    if (run_dir / LOCK).exists():
        return "stopped before its end; go on with --resume"
    quiet = time.time() - metrics.stat().st_mtime  # a program other than launch.train runs it
    if quiet > QUIET_SECONDS:
        return f"no new metrics for {quiet / 60:.0f} minutes; if the run was killed, go on with --resume"
    return "running"


if __name__ == "__main__":
    sys.exit(main())
