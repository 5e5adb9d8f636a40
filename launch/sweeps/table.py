"""The live table of a sweep on a terminal, and plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from launch.sweeps.folder import Standing, SweepFolder
from worldloom.report.page import duration

REFRESH_SECONDS = 1.0
ORDER = ("running", "failed", "saved", "waiting", "finished")
COLOURS = {"running": "cyan", "failed": "red", "saved": "yellow", "waiting": "dim", "finished": "green"}
ROWS_BESIDE = 6  # lines of a terminal that the rows cannot have: head, foot and the prompt


Totals = int | Mapping[str, int]


class SweepTable:
    """Shows the runs of a sweep.

    names: returns those that are known by now. totals: their total steps, or one number for all.
    """

    def __init__(self, folder: SweepFolder, names: Callable[[], Sequence[str]], totals: Totals) -> None:
        self._folder, self._names, self._totals = folder, names, totals
        self._live: Any = _live() if sys.stdout.isatty() and find_spec("rich") else None
        self._shown_at = 0.0
        self._said: dict[str, str] = {}

    def refresh(self) -> None:
        """Show the newest figures, at most once a second."""
        if time.monotonic() - self._shown_at < REFRESH_SECONDS:
            return
        self._shown_at = time.monotonic()
        standings = {name: self._folder.standing(name) for name in self._names()}
        if self._live is not None:
            self._live.update(self._table(standings), refresh=True)
        else:
            self._say_changes(standings)

    def say(self, text: str) -> None:
        """Print a line that stays above the table."""
        if self._live is None:
            print(text, flush=True)
        else:
            self._live.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Show how every run stands at the end."""
        self._shown_at = 0.0
        self.refresh()
        if self._live is not None:
            self._live.stop()

    def _say_changes(self, standings: dict[str, Standing]) -> None:
        done = sum(standing.status == "finished" for standing in standings.values())
        for name, standing in standings.items():
            if standing.status not in ("waiting", "failed", self._said.get(name)):  # a failure is said with its error
                print(f"{name}: {self._words(name, standing)} · {done} of {len(standings)} finished", flush=True)
            self._said[name] = standing.status

    def _total(self, name: str) -> int:
        return self._totals if isinstance(self._totals, int) else self._totals[name]

    def _words(self, name: str, standing: Standing) -> str:
        words = [standing.status]
        if standing.env_steps:
            words.append(f"{standing.env_steps:,} of {self._total(name):,} steps")
        if standing.last_return is not None:
            words.append(f"return {standing.last_return:,.1f}")
        return " · ".join(words)

    def _table(self, standings: dict[str, Standing]) -> Any:
        from rich.table import Table
        from rich.text import Text

        shown = sorted(standings.items(), key=lambda item: ORDER.index(item[1].status))
        room = max(self._live.console.height - ROWS_BESIDE, 3)
        counts = {status: sum(each.status == status for each in standings.values()) for status in ORDER}
        caption = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        hidden = f" · {len(shown) - room} rows are hidden" if len(shown) > room else ""
        table = Table(box=None, caption=f"{caption}{hidden}", caption_justify="left", pad_edge=False)
        for title in ("run", "status", "steps", "return", "time"):
            table.add_column(title, justify="left" if title in ("run", "status") else "right", no_wrap=True)
        for name, each in shown[:room]:
            total = self._total(name)
            share = f"{each.env_steps:,} ({each.env_steps / total:.0%})" if each.env_steps else ""
            last = "" if each.last_return is None else f"{each.last_return:,.1f}"
            status = Text(each.status, COLOURS[each.status])
            table.add_row(Text(name), status, share, last, duration(each.wall_seconds) if each.wall_seconds else "")
        return table


def _live() -> Any:
    from rich.live import Live

    live = Live(auto_refresh=False, vertical_overflow="crop")
    live.start()
    return live


def last_line(error: str) -> str:
    """Return the last line of an error that says what was wrong."""
    lines = [line for line in error.splitlines() if line.strip() and not line.startswith("Run with --help")]
    return lines[-1].strip() if lines else ""
