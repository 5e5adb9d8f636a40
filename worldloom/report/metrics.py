"""Records of a run: its events, rates and limits, as metrics, a display and summary.json."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from worldloom.acting.evaluation import Evaluation
from worldloom.contract import as_floats
from worldloom.replay.chunk import ChunkInfo
from worldloom.report.display import Display, Standing
from worldloom.report.origin import origin
from worldloom.report.page import FILM, PICTURE, write_report
from worldloom.report.pictures import Drawn
from worldloom.report.sinks import MetricsLogger, Sink
from worldloom.report.subject import Subject
from worldloom.report.timing import Staleness, Timing
from worldloom.types import Metrics

RECENT_EPISODES = 20
FRAME_MS = 100  # of a film, as launch.imagine has it
LOSSES = (
    "env_failures",
    "actor_restarts",
    "learner_restarts",
    "env_steps_discarded",
    "updates_lost",
    "rows_lost",
    "checkpoints_failed",
)
COUNTERS = ("episodes", "true_ends", *LOSSES)


class Limiter(Protocol):
    """The totals of a run and its train ratio."""

    env_steps: int
    updates: int
    train_ratio: float

    @property
    def learning(self) -> bool:
        """True once the warm-up is over."""

    @property
    def actual(self) -> float:
        """Train ratio so far."""

    def updates_left(self, total_steps: int) -> int:
        """Return the updates still to be made by the time that `total_steps` are accepted."""


class LearnerMeans:
    """Means of the learner's metrics over the updates since the last log line."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._updates = 0

    def add(self, metrics: Metrics, updates: int) -> None:
        """Add metrics that are means over `updates` updates. Raises ContractBroken if one is no number."""
        for name, value in as_floats(metrics).items():
            self._sums[name] += value * updates
        self._updates += updates

    def take(self) -> dict[str, float]:
        """Return the means by name, and start again from zero."""
        means = {f"learner/{name}": total / self._updates for name, total in self._sums.items()}
        self._sums.clear()
        self._updates = 0
        return means


class Episodes:
    """Keeps the last returns, and a hint that is given once, when the first episode ends terminated."""

    def __init__(self, true_ends_hint: str | None) -> None:
        self._returns: deque[float] = deque(maxlen=RECENT_EPISODES)
        self._hint = true_ends_hint

    def add(self, info: ChunkInfo) -> str | None:
        """Add the episodes of a chunk; return the hint if it is due."""
        self._returns.extend(info.returns)
        if not info.true_ends:
            return None
        hint, self._hint = self._hint, None
        return hint

    def mean_return(self) -> float | None:
        return float(np.mean(self._returns)) if self._returns else None


class Recorder:
    """Records chunks, updates, evaluations and losses; `limiter` holds the totals of steps and updates.

    before: counters of earlier sessions of the run, as `saved_counters` returned them.
    """

    def __init__(
        self,
        run_dir: Path,
        subject: Subject,
        limiter: Limiter,
        before: Mapping[str, Any],
        true_ends_hint: str | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self._run_dir, self._subject, self._limiter = run_dir, subject, limiter
        self._logger = MetricsLogger(run_dir, sinks, limiter.env_steps if before else None)
        self._display = Display(subject.total_steps)
        self.counters = {name: int(before.get(name, 0)) for name in COUNTERS}
        self.timing, self._staleness = Timing(float(before.get("wall_seconds", 0.0)), self._counts), Staleness()
        self._learner, self._episodes = LearnerMeans(), Episodes(true_ends_hint)
        self._gauges: dict[str, float] = {}
        self.last_evaluation: Evaluation | None = None

    def say(self, text: str) -> None:
        self._display.say(text)

    @property
    def _counts(self) -> tuple[int, int]:
        return self._limiter.env_steps, self._limiter.updates

    @property
    def busy_seconds(self) -> float:
        """Seconds of learning since the start."""
        return self.timing.total("learning")

    def chunk(self, info: ChunkInfo, newest_version: int) -> None:
        """Record an accepted chunk."""
        self._logger.open_boards()
        self.counters["episodes"] += len(info.returns)
        self.counters["true_ends"] += info.true_ends
        self.timing.spend("acting", info.waited)
        if self._limiter.learning:
            self.timing.end_warm_up(self._counts)
        if info.version is not None:
            self._staleness.acted(info.version, newest_version)
        if info.failures:
            self.counters["env_failures"] += info.failures
            raised = f"{info.failures} environment(s) raised an error and were rebuilt"
            self.say(f"actor {info.key.actor}: {raised}; the last error: {info.last_failure}")
        if hint := self._episodes.add(info):
            self.say(hint)
        self._display.show(self._standing)

    def updated(self, metrics: Metrics, updates: int, seconds: float, publish_seconds: float = 0.0) -> None:
        """Record updates that took `seconds`, plus publish_seconds for publishing weights; metrics: their means."""
        self.timing.spend("publishing", publish_seconds)
        self.timing.spend("learning", seconds)
        self.timing.end_first_updates(self._counts)
        self._learner.add(metrics, updates)
        self._display.show(self._standing)

    def gauges(self, values: Mapping[str, float]) -> None:
        """Set values by name that every line of metrics shows until they are set again."""
        self._gauges.update(values)

    def published(self, version: int) -> None:
        """Record that weights of `version` are available from now on."""
        self._staleness.published(version)

    def rows_lost(self, count: int) -> None:
        """Record rows that were lost with missing or damaged files of a checkpoint."""
        self.counters["rows_lost"] += count
        if count:
            self.say(f"warning: {count:,} rows of replay are lost with damaged files; the run goes on without them")

    def held(self, seconds: float) -> None:
        """Record that collecting had to wait for the learner."""
        self.timing.spend("held", seconds)

    def evaluated(self, env_steps: int, evaluation: Evaluation) -> None:
        self.last_evaluation = evaluation
        metrics = {
            "eval/return_mean": evaluation.mean,
            "eval/return_std": evaluation.std,
            "eval/length_mean": float(np.mean(evaluation.lengths)),
        }
        self._logger.write(env_steps, self._limiter.updates, self.wall_seconds, metrics)
        self.say(
            f"step {env_steps:,}: evaluation over {len(evaluation.returns)} episodes: "
            f"{evaluation.mean:.1f} ± {evaluation.std:.1f}"
        )

    def picture(self, drawn: Drawn | None) -> None:
        """Record a picture of the model's imagination on the boards; the report shows the newest, and its film."""
        if drawn is None:
            return
        import imageio.v3 as imageio

        self._logger.picture(self._limiter.env_steps, "imagination", drawn.picture)
        try:
            imageio.imwrite(self._run_dir / PICTURE, drawn.picture)
            if drawn.film is not None:
                imageio.imwrite(self._run_dir / FILM, drawn.film, duration=FRAME_MS, loop=0)
        except OSError as error:
            self.say(f"the picture of imagination was not written: {error}")

    def log(self) -> None:
        """Write a line of metrics for the time since the last line."""
        limiter, shares = self._limiter, self.timing.shares()
        metrics = {**self._rates(), **self._staleness.metrics(), **self._gauges, **self._learner.take()}
        if (mean := self._episodes.mean_return()) is not None:
            metrics["episode/return"] = mean
        metrics |= {f"limits/{name}": share for name, share in shares.items()}
        most = max(shares, key=lambda name: shares[name])
        self._logger.write(limiter.env_steps, limiter.updates, self.wall_seconds, metrics, limited_by=most)
        self._display.line(self._standing(longer=False))
        self.timing.mark(self._counts)

    def _rates(self) -> dict[str, float]:
        limiter, timing = self._limiter, self.timing
        steps_per_second, updates_per_second = timing.rates(self._counts)
        waiting = max(timing.span - timing.lately("learning"), 0.0) if limiter.learning else 0.0
        return {
            "rate/env_steps_per_second": steps_per_second,
            "rate/updates_per_second": updates_per_second,
            "rate/learner_busy_fraction": timing.busy_fraction(),
            "rate/train_ratio": limiter.actual,
            "rate/train_ratio_error": abs(limiter.actual / limiter.train_ratio - 1) if limiter.updates else 0.0,
            "wait/collecting_seconds": timing.lately("held"),
            "wait/learning_seconds": waiting,
            "wait/acting_seconds": timing.lately("acting"),
            "weights/publish_fraction": timing.lately("publishing") / timing.span,
            **{f"count/{name}": float(value) for name, value in self.counters.items() if name in LOSSES},
            "frames": float(limiter.env_steps * self._subject.action_repeat),
            "episodes": float(self.counters["episodes"]),
        }

    def _standing(self, longer: bool = True) -> Standing:
        """Return the progress now; longer: over up to two log intervals, so that it stays calm after a log line."""
        limiter, timing, total = self._limiter, self.timing, self._subject.total_steps
        left = max(total - limiter.env_steps, 0), limiter.updates_left(total)
        return Standing(
            limiter.env_steps,
            limiter.updates,
            self.wall_seconds,
            timing.seconds_left(*left, self._counts),
            timing.rates(self._counts, longer)[0],
            self._episodes.mean_return(),
            self.last_evaluation.mean if self.last_evaluation else None,
            timing.shares(longer),
        )

    @property
    def wall_seconds(self) -> float:
        """Seconds of the whole run, earlier sessions included."""
        return self.timing.wall_seconds

    def saved_counters(self) -> dict[str, Any]:
        """Return the counters from which a resumed run goes on."""
        return {**self.counters, "wall_seconds": self.wall_seconds}

    def summarise(self, status: str, device: str, evaluation: Evaluation | None) -> dict[str, Any]:
        """Write summary.json and report.html; return the content of summary.json."""
        if self.timing.steps_since_mark(self._limiter.env_steps):
            self.log()  # the steps since the last line
        limiter, wall = self._limiter, self.wall_seconds
        summary = {
            "status": status,
            "algorithm": self._subject.algorithm,
            "env_id": self._subject.env_id,
            "env_steps": limiter.env_steps,
            "frames": limiter.env_steps * self._subject.action_repeat,
            "updates": limiter.updates,
            "eval_return_mean": evaluation.mean if evaluation else None,
            "eval_return_std": evaluation.std if evaluation else None,
            "eval_episodes": len(evaluation.returns) if evaluation else 0,
            "wall_seconds": round(wall, 2),
            "env_steps_per_second": round(limiter.env_steps / wall, 2),
            "updates_per_second": round(limiter.updates / wall, 2),
            "learner_busy_fraction": round(self.timing.busy_fraction(), 4),
            "train_ratio_target": limiter.train_ratio,
            "train_ratio_actual": round(limiter.actual, 4),
            "weight_staleness_p95": self._staleness.p95(),
            "limited_by": self.timing.limits(),
            **self.counters,
            "seed": self._subject.seed,
            "device": device,
            "runtime": self._subject.runtime,
            **origin(),
        }
        try:
            (self._run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        except OSError as error:
            self.say(f"summary.json was not written: {error}")
        self._report()
        return summary

    def _report(self) -> None:
        """Write report.html; an error in it does not make the run fail."""
        saved = self._run_dir / "config.yaml"
        try:
            write_report(self._run_dir, self._subject, saved.read_text() if saved.is_file() else "")
        except Exception as error:
            self.say(f"report.html was not written: {type(error).__name__}: {error}")

    def close(self) -> None:
        self._display.close()
        self._logger.close()
