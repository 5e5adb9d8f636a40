"""The display of a run in progress: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any


@dataclass(frozen=True)
class Standing:
    """Progress of a run at one moment."""

    env_steps: int
    updates: int
    steps_per_second: float
    last_return: float | None  # mean over the last episodes
    eval_return: float | None
    limited_by: str


class Display:
    """Shows the progress of a run of `total` steps that began at step `start`. Without rich it prints plain lines."""

    def __init__(self, total: int, start: int, unit: str = "steps") -> None:
        self._total, self._unit = total, unit
        self._live: Any = _live_line(total, start) if sys.stdout.isatty() and find_spec("rich") else None

    def say(self, text: str) -> None:
        """Print a line that stays above the live line."""
        if self._live is None:
            print(text, flush=True)
        else:
            self._live.console.print(text, highlight=False, markup=False)

    def show(self, standing: Standing) -> None:
        """Refresh the live line (does nothing without a terminal)."""
        self._refresh(standing.env_steps, _status(standing))

    def line(self, standing: Standing) -> None:
        """Print a plain line of progress (does nothing on a terminal)."""
        self._print(standing.env_steps, standing.steps_per_second, _status(standing))

    def progress(self, done: int, rate: float, status: str) -> None:
        """Refresh the live line on a terminal, print a plain line elsewhere; rate: units per second."""
        self._refresh(done, status)
        self._print(done, rate, status)

    def _refresh(self, done: int, status: str) -> None:
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=done, status=status)

    def _print(self, done: int, rate: float, status: str) -> None:
        if self._live is None:
            left = max(self._total - done, 0) / rate if rate else 0.0
            share = f"{done:,}/{self._total:,} {self._unit} ({done / self._total:.0%})"
            print(f"{share} · ETA {_clock(left)} · {status}", flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def _live_line(total: int, start: int) -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    ]
    live = Progress(*columns, TextColumn("{task.fields[status]}"), refresh_per_second=4, speed_estimate_period=60)
    live.add_task("train", total=total, completed=start, status="starting")
    live.start()
    return live


def _status(standing: Standing) -> str:
    parts = [f"{standing.steps_per_second:.0f} steps/s", f"{standing.updates:,} updates"]
    if standing.last_return is not None:
        parts.append(f"return {standing.last_return:.1f}")
    if standing.eval_return is not None:
        parts.append(f"eval {standing.eval_return:.1f}")
    return " · ".join([*parts, f"limited by {standing.limited_by}"])


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
