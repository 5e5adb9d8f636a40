"""The command that lists the runs of a storage and copies one here: python -m launch.runs [pull NAME]"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.progress import track
from rich.table import Table

from launch.failures import sentence
from launch.places import FAILURES, run_place, storage
from launch.record import Record, read_record
from worldloom.locations import download, files_below, find, is_file, join
from worldloom.manifest import MANIFEST, newest_checkpoint, read_manifest
from worldloom.runs.home import fetch_small_files

COLUMNS = ("name", "task", "algorithm", "steps", "return", "status", "age")
UNITS = (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))


def command_parser() -> ArgumentParser:
    """Return the parser of the command's options."""
    parser = ArgumentParser(prog="launch.runs", description="List the runs of a storage, or copy one of them here.")
    parser.add_argument("action", nargs="?", choices=("list", "pull"), default="list", help="list (default) or pull")
    parser.add_argument("name", nargs="?", type=str, default=None, help="pull: name, folder or URL of the run")
    where = "folder or URL of the runs; default: $WORLDLOOM_STORAGE, else runs/ or, in a Ray job, ~/worldloom/runs"
    parser.add_argument("--storage", type=str, default=None, help=where)
    parser.add_argument("--to", type=str, default=None, help="pull: folder to write; default: runs/NAME")
    parser.add_argument("--json", action="store_true", help="list: print JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = command_parser().parse_args(argv)
    try:
        if options.action == "list":
            _show(list_runs(storage(options.storage)), storage(options.storage), options.json)
            return 0
        if options.name is None:
            raise ValueError("pull needs the name of a run: python -m launch.runs pull NAME.")
        named = storage(options.storage) / options.name
        run = named if is_file(named / "config.yaml") else run_place(options.name, options.storage)
        folder = pull(run, Path(options.to or Path("runs") / run.name))
    except FAILURES as error:
        print(f"launch.runs: {sentence(error)}", file=sys.stderr)
        return 1
    print(f"copied to {folder}; look at it with: python -m launch.status --run-dir {folder}")
    return 0


def list_runs(place: Path) -> list[Record]:
    """Return the records of all runs in a storage, the one that was updated last first."""
    records = []
    for saved in find(place, "*/config.yaml"):
        try:
            records.append(read_record(saved.parent))
        except (OSError, ValueError, LookupError, TypeError) as error:  # not begun, or not of ours
            print(f"{saved.parent} is left out: {error}", file=sys.stderr)
    return sorted(records, key=lambda record: record.updated, reverse=True)


def describe(record: Record) -> dict[str, str]:
    """Return the row of a run in the list."""
    config, evaluated = record.config, record.last("eval/return_mean")
    trained = record.last("episode/return")
    shown = f"{evaluated['eval/return_mean']:,.1f}" if evaluated else ""
    if not shown and trained:
        shown = f"{trained['episode/return']:,.1f} (training)"
    steps = f"{record.steps:,} of {record.total_steps:,}"
    state = record.state.partition(" (")[0].partition(":")[0].partition(";")[0]
    values = (record.run.name, config["env"]["id"], config["algorithm"], steps, shown, state, _ago(record.updated))
    return dict(zip(COLUMNS, values, strict=True))


def _ago(moment: float) -> str:
    seconds = max(time.time() - moment, 0.0)
    unit, length = next(((unit, length) for unit, length in UNITS if seconds >= length), UNITS[-1])
    return f"{seconds / length:.0f} {unit}"


def _show(records: list[Record], place: Path, as_json: bool) -> None:
    rows = [describe(record) for record in records]
    if as_json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print(
            f"{place} holds no runs. Choose another --storage, or begin one: python -m launch.train --storage {place}"
        )
    else:
        table = Table(*COLUMNS, title=str(place), title_justify="left", box=None, padding=(0, 2, 0, 0))
        for row in rows:
            table.add_row(*row.values())
        Console().print(table)


def pull(run: Path, folder: Path) -> Path:
    """Copy a run to a new folder of this machine: everything but old checkpoints. Return the folder.

    Raises ValueError if the folder is not empty, FileNotFoundError if there is no such run.
    """
    if not is_file(run / "config.yaml"):
        raise FileNotFoundError(f"{run} holds no config.yaml, expected the folder, URL or name of a run.")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty. Choose another folder with --to.")
    fetch_small_files(run, folder)
    if find(run, "checkpoints/*"):
        checkpoint = newest_checkpoint(run)
        rows = [f"../rows/{name}" for shard in read_manifest(checkpoint)["rows"] for name in shard]
        names = [*rows, *sorted(files_below(checkpoint).keys() - {MANIFEST}), MANIFEST]  # last: it makes them valid
        for name in track(names, description=checkpoint.name, disable=not sys.stderr.isatty()):
            source = join(checkpoint, name)
            target = join(folder / "checkpoints" / checkpoint.name, name)
            download(source, target)
    return folder


if __name__ == "__main__":
    sys.exit(main())
