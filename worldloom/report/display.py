"""The display of a run in progress: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

REFRESHES_PER_SECOND = 4
BAR = 10  # columns
SMALL_SHARE = 0.05  # smaller shares of what limits a run are not shown
UNKNOWN = "-:--"  # the time left before the first update has been timed


@dataclass(frozen=True)
class Standing:
    """Progress of a run at one moment."""

    env_steps: int
    updates: int
    seconds: float  # of the whole run so far
    seconds_left: float | None  # None during the warm-up: nobody knows yet how long an update takes
    steps_per_second: float
    last_return: float | None  # mean over the last episodes
    eval_return: float | None
    limits: Mapping[str, float]  # shares of the time by what limited the run


@dataclass(frozen=True)
class Line:
    """Holds what one line shows.

    texts: (place, text), the most important first. Places go from left to right. A later text for a place replaces an
    earlier one if there is room for it.
    """

    done: int
    total: int
    texts: Sequence[tuple[int, str]]

    def fit(self, width: int) -> str:
        """Return the most important texts that fill at most `width` columns."""
        chosen: dict[int, str] = {}
        for place, text in self.texts:
            wished = {**chosen, place: text}
            if len(" · ".join(wished.values())) <= width:
                chosen = wished
        return " · ".join(chosen[place] for place in sorted(chosen))

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        filled, text = round(BAR * min(self.done / self.total, 1.0)), self.fit(options.max_width - BAR - 1)
        parts = [("━" * filled, "bar.complete"), ("─" * (BAR - filled), "bar.back"), (f" {text}", "")]
        yield Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


class Display:
    """Shows the progress of a run of `total` units. Without rich or a terminal it prints plain lines."""

    def __init__(self, total: int, unit: str = "steps") -> None:
        self._total, self._unit = total, unit
        self._refreshed = 0.0
        self._live: Any = _live() if sys.stdout.isatty() and find_spec("rich") else None

    def say(self, text: str) -> None:
        """Print a line that stays above the live line."""
        if self._live is None:
            print(text, flush=True)
        else:
            self._live.console.print(text, highlight=False, markup=False)

    def show(self, standing: Callable[[], Standing]) -> None:
        """Refresh the live line, unless it is fresh (does nothing without a terminal)."""
        if self._live is not None and time.monotonic() - self._refreshed > 1 / REFRESHES_PER_SECOND:
            self._refreshed = time.monotonic()
            self._live.update(run_line(standing(), self._total))

    def line(self, standing: Standing) -> None:
        """Print a plain line of progress (does nothing on a terminal)."""
        if self._live is None:
            parts = [f"{standing.steps_per_second:.0f} steps/s", f"{standing.updates:,} updates", *_returns(standing)]
            self._print(
                standing.env_steps, standing.seconds_left, [*parts, f"limited by {describe_limits(standing.limits)}"]
            )

    def progress(self, done: int, rate: float, status: str) -> None:
        """Refresh the live line on a terminal, print a plain line elsewhere; rate: units per second."""
        left = max(self._total - done, 0) / rate if rate else None
        if self._live is None:
            self._print(done, left, [status])
        else:
            texts = [(0, _count(done, self._total)), (1, _eta(left)), (2, status)]
            self._live.update(Line(done, self._total, texts))

    def _print(self, done: int, left: float | None, parts: Sequence[str]) -> None:
        share = f"{_count(done, self._total)} {self._unit} ({done / self._total:.0%})"
        print(" · ".join([share, _eta(left), *parts]), flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def run_line(standing: Standing, total: int) -> Line:
    """Return the live line of a run: what matters first fits 80 columns, all of it fits 120."""
    count, eta, elapsed, rate, updates, returned, evaluated, limit = range(8)
    most = next(iter(_sorted(standing.limits)), "")
    texts = [
        (count, f"{standing.env_steps / total:.0%}"),
        (eta, _eta(standing.seconds_left)),
        (limit, f"limit: {most}"),
        (count, _count(standing.env_steps, total)),
    ]
    texts += [(returned, text) for text in _returns(standing)[:1]]
    texts += [(rate, f"{standing.steps_per_second:.0f} steps/s")]
    texts += [(evaluated, text) for text in _returns(standing)[1:]]
    texts += [
        (limit, f"limit: {describe_limits(standing.limits)}"),
        (updates, f"{standing.updates:,} updates"),
        (elapsed, f"{_clock(standing.seconds)} so far"),
    ]
    return Line(standing.env_steps, total, texts)


def _live() -> Any:
    from rich.live import Live

    live = Live("starting", refresh_per_second=REFRESHES_PER_SECOND)
    live.start()
    return live


def _returns(standing: Standing) -> list[str]:
    shown = {"return": standing.last_return, "eval": standing.eval_return}
    return [f"{name} {value:.1f}" for name, value in shown.items() if value is not None]


def _sorted(limits: Mapping[str, float]) -> list[str]:
    """Return the limits with their shares, the largest first. One that fills the time needs no share."""
    largest = sorted(limits.items(), key=lambda item: -item[1])
    shown = [(name, f"{share:.0%}") for name, share in largest if share >= SMALL_SHARE]
    return [name if share == "100%" else f"{name} {share}" for name, share in shown]


def describe_limits(limits: Mapping[str, float]) -> str:
    """Return what limited a run, with shares of the time, the largest first."""
    return ", ".join(_sorted(limits))


def _count(done: int, total: int) -> str:
    return f"{done:,}/{total:,}"


def _eta(seconds: float | None) -> str:
    return f"ETA {UNKNOWN if seconds is None else _clock(seconds)}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
