"""The status command, for runs that go on or have ended: python -m launch.status --run-dir DIR"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from launch.failures import sentence
from launch.places import run_place
from launch.record import read_record
from worldloom.files import CheckpointError
from worldloom.report.display import describe_limits
from worldloom.runs.verify import verify


def command_parser() -> ArgumentParser:
    """Return the parser of the command's options."""
    parser = ArgumentParser(prog="launch.status", description="Print the status of a run.")
    parser.add_argument("--run-dir", dest="run_dir", type=str, required=True, help="folder, URL or name of a run")
    parser.add_argument("--verify", action="store_true", help="also check the newest checkpoint's invariants")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = command_parser().parse_args(argv)
    try:
        run = run_place(options.run_dir)
        for name, value in status(run):
            print(f"{name:<22}{value}")
        broken = verify(run) if options.verify else []
    except (OSError, ValueError, CheckpointError) as error:
        print(f"launch.status: {sentence(error)}", file=sys.stderr)
        return 1
    if options.verify:
        print("\n".join(f"{'broken':<22}{text}" for text in broken) or f"{'invariants':<22}hold")
    return 1 if broken else 0


def status(run: Path) -> list[tuple[str, str]]:
    """Return the (name, value) pairs to print. Raises FileNotFoundError if there is no run."""
    record = read_record(run)
    config, logged, newest = record.config, record.last("rate/train_ratio"), record.last("eval/return_mean")
    last: dict[str, Any] = record.lines[-1] if record.lines else {}
    shown = [
        ("run", f"{config['algorithm']} on {config['env']['id']}, seed {config['train']['seed']}"),
        ("status", record.state),
        ("steps", f"{record.steps:,} of {record.total_steps:,} ({record.steps / record.total_steps:.0%})"),
        ("updates", f"{last.get('updates', 0):,}"),
        ("wall time", f"{last.get('wall_seconds', 0) / 60:.1f} min"),
    ]
    for name, key, form in FIGURES:
        if key in logged:
            shown.append((name, form.format(logged[key])))
    if newest:
        mean, std = newest["eval/return_mean"], newest["eval/return_std"]
        shown.append(("evaluation", f"{mean:,.1f} ± {std:,.1f} at step {newest['env_steps']:,}"))
    shown.append(("checkpoint", record.checkpoints[-1] if record.checkpoints else "none yet"))
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
    ("learner restarts", "count/learner_restarts", "{:g}"),
    ("steps discarded", "count/env_steps_discarded", "{:g}"),
    ("updates lost", "count/updates_lost", "{:g}"),
    ("rows lost", "count/rows_lost", "{:g}"),
    ("checkpoints failed", "count/checkpoints_failed", "{:g}"),
]


if __name__ == "__main__":
    sys.exit(main())
