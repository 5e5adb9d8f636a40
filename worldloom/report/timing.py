"""The time that a run spends on its parts, and the age of the weights that act."""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque

import numpy as np

RECENT_CHUNKS = 200
PUBLISHES_KNOWN = 1000
BUSY, WAITING = 0.8, 0.5  # shares of time from which the learner counts as busy, and collecting as waiting


class Timing:
    """Seconds of learning and waiting, and rates of steps and updates, over the run and since the last log line.

    before: seconds of earlier sessions of the run. counts: environment steps and updates so far.
    """

    def __init__(self, before: float, counts: tuple[int, int]) -> None:
        self._before, self._begun, self._counts = before, time.monotonic(), counts
        self._learning_since: float | None = None
        self._sums: dict[str, float] = defaultdict(float)  # seconds by activity
        self._at_mark: dict[str, float] = {}  # the sums at the last log line
        self._mark = self._begun  # time of the last log line
        self._limits: dict[str, float] = defaultdict(float)  # seconds by what limited the run

    @property
    def wall_seconds(self) -> float:
        """Seconds of the whole run, earlier sessions included."""
        return self._before + time.monotonic() - self._begun

    @property
    def span(self) -> float:
        """Seconds since the last log line."""
        return max(time.monotonic() - self._mark, 1e-9)

    def spend(self, what: str, seconds: float) -> None:
        """Add seconds of an activity: `learning`, `publishing`, `held` (collecting waited for the learner) or `acting`
        (env actors waited for actions)."""
        if what == "learning" and self._learning_since is None:
            self._learning_since = time.monotonic() - seconds
        self._sums[what] += seconds

    def total(self, what: str) -> float:
        return self._sums[what]

    def lately(self, what: str) -> float:
        """Return the seconds of an activity since the last log line."""
        return self._sums[what] - self._at_mark.get(what, 0.0)

    def steps_since_mark(self, env_steps: int) -> int:
        return env_steps - self._counts[0]

    def rates(self, counts: tuple[int, int]) -> tuple[float, float]:
        """Return environment steps and updates per second since the last log line."""
        steps, updates = ((now - then) / self.span for now, then in zip(counts, self._counts, strict=True))
        return steps, updates

    def busy_fraction(self) -> float:
        """Return the share of time that the learner spent learning, since its first update."""
        if self._learning_since is None:
            return 0.0
        return min(self._sums["learning"] / max(time.monotonic() - self._learning_since, 1e-9), 1.0)

    def limited_by(self, learning: bool) -> str:
        """Return what limited the run since the last log line. learning: the warm-up is over.

        A busy learner gives "learner", or "ratio" if collecting also had to wait. A learner that is not busy gives
        "replay" if collecting had to wait, else "environments"."""
        if not learning:
            return "environments (warm-up)"
        busy, waiting = self.lately("learning") / self.span >= BUSY, self.lately("held") / self.span >= WAITING
        if busy:
            return "ratio" if waiting else "learner"
        return "replay" if waiting else "environments"

    def mark(self, limited_by: str, counts: tuple[int, int]) -> None:
        """Begin the period of the next log line."""
        self._limits[limited_by] += self.span
        self._mark, self._at_mark, self._counts = time.monotonic(), dict(self._sums), counts

    def limits(self) -> dict[str, float]:
        """Return the shares of time by what limited the run."""
        total = sum(self._limits.values())
        return {name: round(seconds / total, 3) for name, seconds in self._limits.items()}


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
