"""Callbacks of offline training: logging, checkpoints, early stopping."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from worldloom.files import write_text
from worldloom.report.sinks import MetricsLogger
from worldloom.training.trainer import Callback, Trainer

BEST = "best.json"


class LoggingCallback(Callback):
    """Writes metrics as plain lines (console) and into a directory: metrics.jsonl, metrics.csv, TensorBoard events.

    directory: None writes no files. TensorBoard events need tensorboardX, from worldloom[training].
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, *, console: bool = True) -> None:
        self.directory = None if directory is None else Path(directory)
        self.console = console
        self._logger: MetricsLogger | None = None
        self._begun = time.monotonic()

    def on_train_begin(self, trainer: Trainer) -> None:  # noqa: ARG002
        self._begun = time.monotonic()
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._logger = MetricsLogger(self.directory)

    def on_log(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        self._write(trainer, metrics)

    def on_evaluate(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        self._write(trainer, metrics)

    def on_train_end(self, trainer: Trainer) -> None:  # noqa: ARG002
        if self._logger is not None:
            self._logger.close()
            self._logger = None

    def _write(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        if self.console:
            print(f"step {trainer.step:,}: " + " · ".join(f"{k} {v:.4g}" for k, v in metrics.items()), flush=True)
        if self._logger is not None and self.directory is not None:
            self._logger.write(None, trainer.step, time.monotonic() - self._begun, metrics)
            append_csv(self.directory / "metrics.csv", {"step": trainer.step, **metrics})


def append_csv(path: Path, row: Mapping[str, float]) -> None:
    """Append a row; new columns are added to the table, and cells without a value stay empty."""
    rows: list[Mapping[str, object]] = []
    header: list[str] = []
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or [])
            if not row.keys() <= set(header):
                rows = list(reader)
    if header and row.keys() <= set(header):
        with path.open("a", newline="") as file:
            csv.DictWriter(file, header).writerow(row)
        return
    header += [name for name in row if name not in header]
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows([*rows, row])
    partial.replace(path)


class CheckpointCallback(Callback):
    """Saves every `interval` updates and at the end to directory/step-N, of which the newest `keep` stay, and the best
    model to directory/best.

    interval: None takes config.save_interval. best: the lowest `monitor` of all evaluations, or of all logged means
    if there is no validation data ("eval/loss" falls back to "loss"); directory/best.json holds its value, so that a
    training that goes on from a checkpoint knows it. Checkpoints of later steps, from another training, are left alone.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        interval: int | None = None,
        *,
        keep: int = 3,
        monitor: str = "eval/loss",
    ) -> None:
        if keep < 1 or (interval is not None and interval < 1):
            raise ValueError(f"CheckpointCallback: interval is {interval} and keep {keep}, expected at least 1.")
        self.directory, self.interval, self.keep, self.monitor = Path(directory), interval, keep, monitor
        self.best = math.inf
        self._evaluates = False

    def on_train_begin(self, trainer: Trainer) -> None:
        saved = self.directory / BEST
        if trainer.step and saved.is_file() and (self.directory / "best").is_dir():
            best = json.loads(saved.read_text())
            self.best, self._evaluates = float(best["value"]), bool(best["evaluated"])

    def on_step(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:  # noqa: ARG002
        interval = self.interval or trainer.config.save_interval
        if interval and trainer.step % interval == 0:
            self._save(trainer)

    def on_log(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        if not self._evaluates:
            self._keep_best(trainer, metrics.get(self.monitor, metrics.get(self.monitor.removeprefix("eval/"))))

    def on_evaluate(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        if not self._evaluates and self.monitor in metrics:
            self._evaluates, self.best = True, math.inf
        self._keep_best(trainer, metrics.get(self.monitor))

    def on_train_end(self, trainer: Trainer) -> None:
        self._save(trainer)

    def _keep_best(self, trainer: Trainer, value: float | None) -> None:
        if value is not None and value < self.best:
            trainer.save_checkpoint(self.directory / "best")
            self.best = value
            saved = {"value": value, "evaluated": self._evaluates, "step": trainer.step}
            write_text(self.directory / BEST, json.dumps(saved) + "\n")

    def _save(self, trainer: Trainer) -> None:
        newest = trainer.save_checkpoint(self.directory / f"step-{trainer.step:09d}")
        saved = sorted(path for path in self.directory.glob("step-*") if not path.suffix and path.name <= newest.name)
        for old in saved[: -self.keep]:
            shutil.rmtree(old)


class EarlyStoppingCallback(Callback):
    """Ends the training when `monitor` has not fallen by more than `min_delta` in `patience` evaluations in a row."""

    def __init__(self, monitor: str = "eval/loss", *, patience: int = 5, min_delta: float = 0.0) -> None:
        if patience < 1 or min_delta < 0:
            raise ValueError(
                f"EarlyStoppingCallback: patience is {patience} and min_delta {min_delta}, expected at least 1 and 0."
            )
        self.monitor, self.patience, self.min_delta = monitor, patience, min_delta
        self.best, self.waited = math.inf, 0

    def on_evaluate(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        if self.monitor not in metrics:
            raise ValueError(f"EarlyStoppingCallback monitors {self.monitor!r}, expected one of {sorted(metrics)}.")
        if metrics[self.monitor] < self.best - self.min_delta:
            self.best, self.waited = metrics[self.monitor], 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            trainer.stop()
