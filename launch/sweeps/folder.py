"""The folder of a sweep: sweep.json, one run directory for each run, their configurations, logs and errors."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.arguments import dump_config
from launch.claim import SILENT_SECONDS, holder_of, silence
from worldloom.files import write_text
from worldloom.report.boards import flat
from worldloom.report.compared import OF_THE_MACHINE
from worldloom.report.lines import current_lines
from worldloom.runs.config import RunConfig

TAIL_BYTES = 64 * 2**10  # of metrics.jsonl, which hold the newest figures


@dataclass(frozen=True)
class Standing:
    """Holds how far a run has come. status: waiting, running, saved, finished or failed."""

    status: str
    env_steps: int = 0
    wall_seconds: float = 0.0
    last_return: float | None = None  # of the newest evaluation; before any, of the last episodes in training
    error: str = ""


class SweepFolder:
    """The files of a sweep; what they say is all that a later call needs to go on with it."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.stop_file = self.path / "stop"  # while it exists, runs save and end
        self.errors: dict[str, str] = {}
        self._content: dict[str, Any] = {}

    def begin(self, runs: Mapping[str, RunConfig], search: Mapping[str, Any] | None, command: Sequence[str]) -> None:
        """Write sweep.json and a configuration for each run, or go on with what is there; a grid may have grown.

        Raises ValueError if the folder holds another sweep.
        """
        configs = {name: dataclasses.asdict(config) for name, config in runs.items()}
        content = {"format": 1, "command": list(command), "search": search, "runs": configs}
        content = json.loads(json.dumps(content))  # tuples become lists, as in the file
        saved = self.path / "sweep.json"
        if saved.is_file():
            self._check_same(json.loads(saved.read_text()), content)
        elif self.path.is_dir() and any(path.name != ".lock" for path in self.path.iterdir()):
            raise ValueError(f"{self.path} holds other files but no sweep.json. Choose another --sweep-dir.")
        (self.path / "configs").mkdir(parents=True, exist_ok=True)
        (self.path / "logs").mkdir(exist_ok=True)
        self.stop_file.unlink(missing_ok=True)
        for name, config in runs.items():
            write_text(self.config_of(name), dump_config(config))
        self._content = content
        self.errors = {name: error for name, error in self.read_errors().items() if name in runs}
        self._write()

    def _check_same(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        advice = "Choose another --sweep-dir, or repeat the command that is in its sweep.json."
        if before["search"] != now["search"]:
            raise ValueError(f"{self.path} holds a sweep with another search. {advice}")
        if gone := set(before["runs"]) - set(now["runs"]):
            raise ValueError(f"{self.path} holds a sweep of other runs (for example {min(gone)}). {advice}")
        for name, config in now["runs"].items():
            if name not in before["runs"]:
                continue
            was, wants = flat(before["runs"][name]), flat(config)
            agent = {field for field in (*was, *wants) if field.startswith("agent.")}
            for field in sorted(agent | (set(was) & set(wants))):  # a later version may have other fields
                old, new = was.get(field, "not set"), wants.get(field, "not set")
                if old != new and not field.startswith(OF_THE_MACHINE):
                    raise ValueError(
                        f"{self.path} holds a sweep in which {field} is {old!r}, and now it is {new!r}. {advice}"
                    )

    def _write(self) -> None:
        write_text(self.path / "sweep.json", json.dumps({**self._content, "errors": self.errors}, indent=2) + "\n")

    def config_of(self, name: str) -> Path:
        return self.path / "configs" / f"{name}.yaml"

    def log_of(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def read_errors(self) -> dict[str, str]:
        """Return the errors of the runs that failed when they were last tried, by their names."""
        saved = self.path / "sweep.json"
        return dict(json.loads(saved.read_text())["errors"]) if saved.is_file() else {}

    def try_again(self, names: Iterable[str]) -> None:
        """Forget the errors of runs that are about to be tried again."""
        for name in names:
            self.errors.pop(name, None)
        self._write()

    def failed(self, name: str, error: str) -> None:
        """Keep the error of a run in sweep.json."""
        self.errors[name] = error
        self._write()

    def runs_of_search(self) -> list[str]:
        """Return the names of the runs that a search has begun."""
        return sorted(path.parent.name for path in self.path.glob("sample-*/metrics.jsonl"))

    def standing(self, name: str) -> Standing:
        """Return how far a run has come, from its files."""
        run_dir = self.path / name
        steps, seconds, last = newest_figures(run_dir)
        status = "waiting"
        if is_finished(run_dir):
            status = "finished"
        elif name in self.errors:
            status = "failed"
        elif is_held(run_dir):
            status = "running"
        elif has_checkpoint(run_dir):
            status = "saved"
        return Standing(status, steps, seconds, last, self.errors.get(name, ""))


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """A context in which no other launch.sweep works in the folder. Raises ValueError if one does."""
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another launch.sweep works in {path}. Wait for it, or choose another --sweep-dir."
            ) from None
        yield


def is_finished(run_dir: Path) -> bool:
    try:
        return bool(json.loads((run_dir / "summary.json").read_text())["status"] == "completed")
    except (OSError, ValueError, LookupError):
        return False


def is_held(run_dir: Path) -> bool:
    """Return whether a living process holds the run directory."""
    holder = holder_of(run_dir)
    return holder is not None and silence(run_dir, holder) < SILENT_SECONDS


def has_checkpoint(run_dir: Path) -> bool:
    return any(run_dir.glob("checkpoints/step-*/manifest.json"))


def clear_remains(run_dir: Path) -> None:
    """Remove what is left of a run that ended before its first checkpoint, so that it can begin again."""
    if run_dir.is_dir() and not has_checkpoint(run_dir) and not is_held(run_dir):
        shutil.rmtree(run_dir)


def newest_figures(run_dir: Path) -> tuple[int, float, float | None]:
    """Return steps, seconds and the newest return of a run, from the end of its metrics.jsonl."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(file.seek(0, 2) - TAIL_BYTES, 0))
            tail = file.read().decode(errors="replace").splitlines()
    except OSError:
        return 0, 0.0, None
    lines = current_lines(tail)  # the first and the last may be cut
    steps = max((line.get("env_steps", 0) for line in lines), default=0)
    seconds = max((line.get("wall_seconds", 0.0) for line in lines), default=0.0)
    for metric in ("eval/return_mean", "episode/return"):
        if values := [line[metric] for line in lines if metric in line]:
            return steps, seconds, values[-1]
    return steps, seconds, None
