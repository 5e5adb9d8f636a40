"""What a person sees while a run goes on: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Standing:
    """How the run stands."""

    env_steps: int
    updates: int
    steps_per_second: float
    last_return: float | None  # mean over the last episodes
    eval_return: float | None
    limited_by: str


class Display:
    """Follows a run of `total` steps that began at step `start`. Without rich it prints plain lines."""

    def __init__(self, total: int, start: int) -> None:
        self._total = total
        self._live: Any = None
        if sys.stdout.isatty():
            self._live = _live_line(total, start)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._live is None:
            print(text, flush=True)
        else:
            self._live.console.print(text, highlight=False, markup=False)

    def show(self, standing: Standing) -> None:
        """Refresh the live line (does nothing without a terminal)."""
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=standing.env_steps, status=_status(standing))

    def line(self, standing: Standing) -> None:
        """A plain line of progress (does nothing on a terminal)."""
        if self._live is None:
            rate = standing.steps_per_second
            left = max(self._total - standing.env_steps, 0) / rate if rate else 0.0
            share = f"{standing.env_steps:,}/{self._total:,} steps ({standing.env_steps / self._total:.0%})"
            print(f"{share} · ETA {_clock(left)} · {_status(standing)}", flush=True)

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
