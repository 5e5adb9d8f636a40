"""The run's bookkeeping: what happened, how fast, what held it up; as metrics, a display and summary.json."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from worldloom.acting.evaluation import Evaluation
from worldloom.replay.chunk import ChunkInfo
from worldloom.report.display import Display, Standing
from worldloom.report.page import PICTURE, write_report
from worldloom.report.sinks import MetricsLogger, Sink
from worldloom.report.subject import Subject
from worldloom.types import Array, Metrics

RECENT_EPISODES = 20
RECENT_CHUNKS = 200
PUBLISHES_KNOWN = 1000
LOSSES = (
    "env_failures",
    "actor_restarts",
    "env_steps_discarded",
    "updates_lost",
    "rows_lost",
    "checkpoints_failed",
)
COUNTERS = ("episodes", "true_ends", *LOSSES)


class Limiter(Protocol):
    """The totals of a run, and the train ratio that they keep."""

    env_steps: int
    updates: int
    train_ratio: float

    @property
    def learning(self) -> bool:
        """Whether the warm-up is over."""

    @property
    def actual(self) -> float:
        """The train ratio so far."""


class Recorder:
    """Told of every chunk, update, evaluation and loss; `limiter` holds the totals of steps and updates."""

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
        self._logger = MetricsLogger(run_dir, sinks)
        self._display = Display(subject.total_steps, limiter.env_steps)
        self.counters = {name: int(before.get(name, 0)) for name in COUNTERS}
        self._wall_before = float(before.get("wall_seconds", 0.0))
        self._begun = time.monotonic()
        self._returns: deque[float] = deque(maxlen=RECENT_EPISODES)
        self._staleness: Counter[int] = Counter()  # chunks by how many publishes behind they were
        self._learner_metrics: dict[str, float] = defaultdict(float)
        self._learner_updates = 0
        self.last_evaluation: Evaluation | None = None
        self._learning_since: float | None = None
        self.busy_seconds = 0.0  # seconds of learning, since the start
        self._held = 0.0  # seconds in which collecting had to wait for the learner
        self._mark = (self._begun, limiter.env_steps, limiter.updates, 0.0, 0.0)  # at the last log line
        self._gauges: dict[str, float] = {}
        self._published: dict[int, float] = {}  # when, by version
        self._outdated: deque[float] = deque(maxlen=RECENT_CHUNKS)  # seconds for which newer weights were there
        self._acting_waited = 0.0  # seconds, of env actors for actions
        self._publish_seconds = 0.0  # of the learner
        self._limits: dict[str, float] = defaultdict(float)  # seconds by what held the run up
        self._true_ends_hint = true_ends_hint

    @property
    def wall_seconds(self) -> float:
        """Of the whole run, earlier sessions included."""
        return self._wall_before + time.monotonic() - self._begun

    def say(self, text: str) -> None:
        self._display.say(text)

    def chunk(self, info: ChunkInfo, newest_version: int) -> None:
        """An accepted chunk."""
        self.counters["episodes"] += len(info.returns)
        self.counters["true_ends"] += info.true_ends
        self._returns.extend(info.returns)
        self._acting_waited += info.waited
        if info.version is not None:
            self._staleness[newest_version - info.version] += 1
            superseded = self._published.get(info.version + 1)
            self._outdated.append(0.0 if superseded is None else time.monotonic() - superseded)
        if info.failures:
            self.counters["env_failures"] += info.failures
            raised = f"{info.failures} environment(s) raised and were rebuilt in place"
            self.say(f"actor {info.key.actor}: {raised}; the last: {info.last_failure}")
        if info.true_ends and self._true_ends_hint:
            self.say(self._true_ends_hint)
            self._true_ends_hint = None
        self._display.show(self._standing())

    def updated(self, metrics: Metrics, updates: int, seconds: float, publish_seconds: float = 0.0) -> None:
        """`updates` updates took `seconds`, and publishing weights publish_seconds more; metrics are their means."""
        self._publish_seconds += publish_seconds
        if self._learning_since is None:
            self._learning_since = time.monotonic() - seconds
        for name, value in metrics.items():
            self._learner_metrics[name] += value * updates
        self._learner_updates += updates
        self.busy_seconds += seconds
        self._display.show(self._standing())

    def gauges(self, values: Mapping[str, float]) -> None:
        """Figures of now by name, for every line of metrics until they are told again."""
        self._gauges.update(values)

    def published(self, version: int) -> None:
        """Newer weights than those of lower versions are there from now on."""
        self._published[version] = time.monotonic()
        while len(self._published) > PUBLISHES_KNOWN:
            del self._published[min(self._published)]

    def rows_lost(self, count: int) -> None:
        """With files of a checkpoint that are missing or damaged."""
        self.counters["rows_lost"] += count
        if count:
            self.say(f"warning: {count:,} rows of replay are lost with damaged files; the run goes on without them")

    def held(self, seconds: float) -> None:
        self._held += seconds

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

    def picture(self, image: Array | None) -> None:
        """What the world model imagines, [H, W, 3] uint8: for TensorBoard, and the newest for the report."""
        if image is None:
            return
        import imageio.v3 as imageio

        self._logger.picture(self._limiter.env_steps, "imagination", image)
        try:
            imageio.imwrite(self._run_dir / PICTURE, image)
        except OSError as error:
            self.say(f"{PICTURE} was not written: {error}")

    def log(self) -> None:
        """Write a line of metrics over the time since the last."""
        now, limiter = time.monotonic(), self._limiter
        then, steps, updates, busy, held = self._mark
        span = max(now - then, 1e-9)
        metrics: dict[str, float] = {
            "rate/env_steps_per_second": (limiter.env_steps - steps) / span,
            "rate/updates_per_second": (limiter.updates - updates) / span,
            "rate/learner_busy_fraction": self._busy_fraction(),
            "rate/train_ratio": limiter.actual,
            "rate/train_ratio_error": abs(limiter.actual / limiter.train_ratio - 1) if limiter.updates else 0.0,
            "wait/collecting_seconds": self._held - held,
            "wait/learning_seconds": max(span - (self.busy_seconds - busy), 0.0) if limiter.learning else 0.0,
            "wait/acting_seconds": self._acting_waited,
            "weights/publish_fraction": self._publish_seconds / span,
            **{f"count/{name}": float(value) for name, value in self.counters.items() if name in LOSSES},
            "frames": float(limiter.env_steps * self._subject.action_repeat),
            "episodes": float(self.counters["episodes"]),
        }
        if self._returns:
            metrics["episode/return"] = float(np.mean(self._returns))
        metrics["weights/staleness_p95"] = self._staleness_p95()
        if self._outdated:
            metrics["weights/staleness_seconds_p95"] = float(np.percentile(self._outdated, 95))
        metrics |= self._gauges
        for name, total in self._learner_metrics.items():
            metrics[f"learner/{name}"] = total / self._learner_updates
        words = {"limited_by": self.limited_by()}
        self._logger.write(limiter.env_steps, limiter.updates, self.wall_seconds, metrics, **words)
        self._display.line(self._standing())
        self._limits[words["limited_by"]] += span
        self._acting_waited = self._publish_seconds = 0.0
        self._learner_metrics.clear()
        self._learner_updates = 0
        self._mark = (now, limiter.env_steps, limiter.updates, self.busy_seconds, self._held)

    def _standing(self) -> Standing:
        then, steps, _, _, _ = self._mark
        span = time.monotonic() - then
        return Standing(
            self._limiter.env_steps,
            self._limiter.updates,
            (self._limiter.env_steps - steps) / span if span > 0 else 0.0,
            float(np.mean(self._returns)) if self._returns else None,
            self.last_evaluation.mean if self.last_evaluation else None,
            self.limited_by(),
        )

    def limited_by(self) -> str:
        """What the run waited for since the last log line: the learner where it was busy, or the train ratio where env
        actors could have gone on besides; replay where they had to wait although the learner was idle; the environments
        otherwise."""
        if not self._limiter.learning:
            return "environments (warm-up)"
        then, _, _, busy, held = self._mark
        span = max(time.monotonic() - then, 1e-9)
        learning, waiting = (self.busy_seconds - busy) / span >= 0.8, (self._held - held) / span >= 0.5
        if learning:
            return "ratio" if waiting else "learner"
        return "replay" if waiting else "environments"

    def _busy_fraction(self) -> float:
        if self._learning_since is None:
            return 0.0
        return min(self.busy_seconds / max(time.monotonic() - self._learning_since, 1e-9), 1.0)

    def _staleness_p95(self) -> float:
        """Publishes between the newest weights and those that acted, at most, for 95 % of the chunks."""
        seen, enough = 0, 0.95 * self._staleness.total()
        for versions, chunks in sorted(self._staleness.items()):
            seen += chunks
            if seen >= enough:
                return float(versions)
        return 0.0

    def saved_counters(self) -> dict[str, Any]:
        """What a resumed run goes on counting from."""
        return {**self.counters, "wall_seconds": self.wall_seconds}

    def summarise(self, status: str, device: str, evaluation: Evaluation | None) -> dict[str, Any]:
        """Write summary.json and report.html; returns what the former holds."""
        if self._limiter.env_steps > self._mark[1]:
            self.log()  # what came since the last line
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
            "learner_busy_fraction": round(self._busy_fraction(), 4),
            "train_ratio_target": limiter.train_ratio,
            "train_ratio_actual": round(limiter.actual, 4),
            "weight_staleness_p95": self._staleness_p95(),
            "limited_by": {n: round(s / sum(self._limits.values()), 3) for n, s in self._limits.items()},
            **self.counters,
            "seed": self._subject.seed,
            "device": device,
            "runtime": self._subject.runtime,
        }
        try:
            (self._run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        except OSError as error:
            self.say(f"summary.json was not written: {error}")
        self._report()
        return summary

    def _report(self) -> None:
        """The page for people; a run that did its work is not failed by its page."""
        saved = self._run_dir / "config.yaml"
        try:
            write_report(self._run_dir, self._subject, saved.read_text() if saved.is_file() else "")
        except Exception as error:
            self.say(f"report.html was not written: {type(error).__name__}: {error}")

    def close(self) -> None:
        self._display.close()
        self._logger.close()
