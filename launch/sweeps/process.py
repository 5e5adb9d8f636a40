"""One run of a sweep: launch.train in a process of its own. Grids and searches both run a configuration this way."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.sweeps.folder import clear_remains, has_checkpoint

CHECKOUT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.25
ERROR_LINES = 25
INTERRUPTED = 130  # exit code of a run that saved because it was asked to
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl (Linux)


@dataclass(frozen=True)
class OneRun:
    """Holds what a process needs to train one configuration; it can be sent to another machine.

    config: a YAML file. overrides: values of fields by dotted name. threads: CPU threads that it may use.
    """

    config: Path
    run_dir: Path
    log: Path
    stop_file: Path
    cwd: Path
    threads: int = 1
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        """Return the arguments of launch.train; they go on with the run if it has a checkpoint."""
        resume = ["--resume", "auto"] if has_checkpoint(self.run_dir) else []  # auto: an earlier try may still save
        changes = [f"--{name}={value}" for name, value in self.overrides.items()]
        return ["--config", str(self.config), *changes, "--run-dir", str(self.run_dir), *resume]


def train_one(run: OneRun, watch: Callable[[], None] = lambda: None) -> int:
    """Train to the end, or save and end once the stop file exists. Return the exit code of launch.train.

    watch: called again and again meanwhile; if it raises, the run saves and ends. All that the run says is in its log.
    """
    clear_remains(run.run_dir)
    if run.stop_file.exists():
        return INTERRUPTED
    process = _start(run)
    try:
        while True:
            try:
                code = process.wait(POLL_SECONDS)
                watch()
                return INTERRUPTED if code == -signal.SIGTERM and run.stop_file.exists() else code
            except subprocess.TimeoutExpired:
                watch()
            if run.stop_file.exists():
                process.terminate()
                process.wait()
                return INTERRUPTED
    finally:
        process.terminate()  # nothing happens if it has ended
        process.wait()


def _start(run: OneRun) -> subprocess.Popen[bytes]:
    paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(run.threads)}
    environment.setdefault("WANDB_RUN_GROUP", run.run_dir.parent.name)
    with run.log.open("ab" if has_checkpoint(run.run_dir) else "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "launch.train", *run.arguments()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=run.cwd if run.cwd.is_dir() else CHECKOUT,  # another machine may not have the former
            env=environment,
            start_new_session=True,  # Ctrl-C in the terminal is for the sweep, which then ends its runs
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    """Ask the system for SIGTERM, at which the run saves, when the parent dies."""
    if _LIBC is not None:
        _LIBC.prctl(DEATH_SIGNAL, signal.SIGTERM)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def error_of(log: Path, code: int) -> str:
    """Return the last lines of a failed run's log."""
    try:
        lines = log.read_text(errors="replace").rstrip().splitlines()
    except OSError:
        lines = []
    return "\n".join(lines[-ERROR_LINES:]) or f"launch.train ended with exit code {code} and said nothing"
