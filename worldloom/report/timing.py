"""The time that a run spends on its parts, and the age of the weights that act."""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RECENT_CHUNKS = 200
PUBLISHES_KNOWN = 1000
WARM_UP = "warm-up"
LIMITS = ("learner", "ratio", "environments", "replay", WARM_UP)


@dataclass(frozen=True)
class Mark:
    """Holds what a run had done at one moment. sums: seconds by activity."""

    time: float
    env_steps: int
    updates: int
    sums: Mapping[str, float]


class Timing:
    """Seconds of learning and waiting, and rates of steps and updates, over the run and since the last log line.

    before: seconds of earlier sessions of the run. counts: environment steps and updates so far.
    """

    def __init__(self, before: float, counts: tuple[int, int]) -> None:
        self._before = before
        self._learning_since: float | None = None
        self._sums: dict[str, float] = defaultdict(float)  # seconds by activity
        self._start = self._mark = self._earlier = self._now(counts)  # at the last log line, and at the one before
        self._warm: Mark | None = None  # when the warm-up ended
        self._first: Mark | None = None  # when the first updates were done
        self._limits: dict[str, float] = defaultdict(float)  # seconds by what limited the run

    def _now(self, counts: tuple[int, int]) -> Mark:
        return Mark(time.monotonic(), *counts, dict(self._sums))

    @property
    def wall_seconds(self) -> float:
        """Seconds of the whole run, earlier sessions included."""
        return self._before + time.monotonic() - self._start.time

    @property
    def span(self) -> float:
        """Seconds since the last log line."""
        return max(time.monotonic() - self._mark.time, 1e-9)

    def spend(self, what: str, seconds: float) -> None:
        """Add seconds of an activity: `learning`, `publishing`, `held` (collecting waited for the learner) or `acting`
        (env actors waited for actions)."""
        if what == "learning" and self._learning_since is None:
            self._learning_since = time.monotonic() - seconds
        self._sums[what] += seconds

    def end_warm_up(self, counts: tuple[int, int]) -> None:
        """Note, at the first call, that the warm-up is over."""
        if self._warm is None:
            self._warm = self._now(counts)

    def end_first_updates(self, counts: tuple[int, int]) -> None:
        """Note, at the first call, that the first updates are done. Predictions leave them out: they may compile."""
        if self._first is None:
            self._first = self._now(counts)

    def total(self, what: str) -> float:
        return self._sums[what]

    def lately(self, what: str) -> float:
        """Return the seconds of an activity since the last log line."""
        return self._since(self._mark, what)

    def _since(self, mark: Mark, what: str) -> float:
        return self._sums[what] - mark.sums.get(what, 0.0)

    def steps_since_mark(self, env_steps: int) -> int:
        return env_steps - self._mark.env_steps

    def rates(self, counts: tuple[int, int], longer: bool = False) -> tuple[float, float]:
        """Return environment steps and updates per second since the last log line; longer: since the one before."""
        mark = self._earlier if longer else self._mark
        span = max(time.monotonic() - mark.time, 1e-9)
        return (counts[0] - mark.env_steps) / span, (counts[1] - mark.updates) / span

    def busy_fraction(self) -> float:
        """Return the share of time that the learner spent learning, since its first update."""
        if self._learning_since is None:
            return 0.0
        return min(self._sums["learning"] / max(time.monotonic() - self._learning_since, 1e-9), 1.0)

    def shares(self, longer: bool = False) -> dict[str, float]:
        """Return the shares of the time since the last log line by what limited the run; longer: since the one before.

        Collecting waits because the learner is behind, so while it waits, the learner is taken to be busy: that is the
        share of "ratio". The learner's other busy time is "learner", other waiting is "replay", and the rest is
        "environments". The warm-up is a share of its own.
        """
        mark, now = self._earlier if longer else self._mark, time.monotonic()
        span = max(now - mark.time, 1e-9)
        warm_up = min(max((self._warm.time if self._warm else now) - mark.time, 0.0), span)
        rest = span - warm_up
        busy, held = (min(self._since(mark, what), rest) for what in ("learning", "held"))
        both = min(busy, held)
        seconds = (busy - both, both, rest - max(busy, held), held - both, warm_up)
        return {name: value / span for name, value in zip(LIMITS, seconds, strict=True)}

    def seconds_left(self, steps: int, updates: int, counts: tuple[int, int]) -> float | None:
        """Predict the seconds that further steps and updates take; None until an update after the first is timed.

        An update takes what updates took lately. A step takes the time without learning, per step since the warm-up.
        """
        if self._warm is None or self._first is None or counts[1] <= self._first.updates:
            return 0.0 if steps == updates == 0 else None
        lately = counts[1] > self._earlier.updates and self._earlier.time > self._first.time
        since = self._earlier if lately else self._first
        each = self._since(since, "learning") / (counts[1] - since.updates)
        collected, waited = counts[0] - self._warm.env_steps, time.monotonic() - self._warm.time
        other = max(waited - self._since(self._warm, "learning"), 0.0)
        if not collected:  # updates of the warm-up's steps come first
            collected, other = self._warm.env_steps - self._start.env_steps, self._warm.time - self._start.time
        return updates * each + steps * other / max(collected, 1)

    def mark(self, counts: tuple[int, int]) -> None:
        """Begin the period of the next log line."""
        for name, share in self.shares().items():
            self._limits[name] += share * self.span
        self._earlier, self._mark = self._mark, self._now(counts)

    def limits(self) -> dict[str, float]:
        """Return the shares of time by what limited the run."""
        total = sum(self._limits.values())
        return {name: round(seconds / total, 3) for name, seconds in self._limits.items() if seconds >= total / 2000}


class Staleness:
    """Records how far the weights that act are behind the newest."""

    def __init__(self) -> None:
        self._chunks: Counter[int] = Counter()  # number by publishes behind the newest weights
        self._published: dict[int, float] = {}  # time by version
        self._outdated: deque[float] = deque(maxlen=RECENT_CHUNKS)  # seconds since newer weights were published

    def published(self, version: int) -> None:
        """Record that weights of `version` are available from now on."""
        self._published[version] = time.monotonic()
        while len(self._published) > PUBLISHES_KNOWN:
            del self._published[min(self._published)]

    def acted(self, version: int, newest: int) -> None:
        """Count a chunk that was collected with weights of `version`."""
        self._chunks[newest - version] += 1
        superseded = self._published.get(version + 1)
        self._outdated.append(0.0 if superseded is None else time.monotonic() - superseded)

    def p95(self) -> float:
        """Return the number of publishes that the acting weights were behind, at most, in 95 % of the chunks."""
        seen, enough = 0, 0.95 * self._chunks.total()
        for versions, chunks in sorted(self._chunks.items()):
            seen += chunks
            if seen >= enough:
                return float(versions)
        return 0.0

    def metrics(self) -> dict[str, float]:
        found = {"weights/staleness_p95": self.p95()}
        if self._outdated:
            found["weights/staleness_seconds_p95"] = float(np.percentile(self._outdated, 95))
        return found
