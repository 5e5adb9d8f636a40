"""Training from recorded data: a world model alone, or a whole agent, without an environment and without Ray."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldloom.files import CheckpointError, checksum_of, read_msgpack, write_msgpack
from worldloom.interrupt import GracefulStop
from worldloom.manifest import MANIFEST, find_damage, write_manifest
from worldloom.nearest import nearest
from worldloom.replay.buffer import ReplayBuffer
from worldloom.report.display import Display
from worldloom.training.config import TrainingConfig
from worldloom.training.updates import make_learner
from worldloom.types import Agent, WorldModel

LEARNING, EVALUATION = 0, 1  # purposes of randomness
EVENTS = ("on_train_begin", "on_step", "on_log", "on_evaluate", "on_checkpoint", "on_train_end")


class CallbackError(RuntimeError):
    """A callback raised an error, which is the cause of this one."""


class Callback:
    """Reacts to events of a training; override the methods that you need.

    Metrics are means since the last log (`on_log`) or of one update (`on_step`). A callback may end the training with
    `trainer.stop()`. An error that it raises ends the training as `CallbackError`.
    """

    def on_train_begin(self, trainer: Trainer) -> None:
        """Called before the first update of `Trainer.train`."""

    def on_step(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Called after each update; trainer.step counts it."""

    def on_log(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Called every config.log_interval updates, and after the last one."""

    def on_evaluate(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Called after each evaluation on validation data; names of metrics begin with "eval/"."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """Called after a checkpoint was written."""

    def on_train_end(self, trainer: Trainer) -> None:
        """Called after the last update, an early stop, Ctrl-C, or an error of the training itself."""


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Raise TypeError for an object that is no callback, ValueError for a method on_… that is no event."""
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, type) or not isinstance(callback, Callback):
            shown = f"the class {callback.__name__}" if isinstance(callback, type) else f"a {name}"
            raise TypeError(f"callbacks holds {shown}, expected instances of worldloom.training.Callback.")
        for event in dir(callback):
            if event.startswith("on_") and event not in EVENTS:
                near = nearest(event, EVENTS)
                hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(EVENTS)}."
                raise ValueError(f"callback {name} has {event}, which is no event. {hint}")


class ProgressCallback(Callback):
    """Shows a live bar with rate, ETA and loss on a terminal; elsewhere prints a line at every log."""

    def __init__(self) -> None:
        self._display: Display | None = None
        self._begun, self._start = time.monotonic(), 0

    def on_train_begin(self, trainer: Trainer) -> None:
        self._begun, self._start = time.monotonic(), trainer.step
        self._display = Display(trainer.config.total_steps, unit="updates")

    def on_log(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        rate = (trainer.step - self._start) / max(time.monotonic() - self._begun, 1e-9)
        if self._display is not None:
            status = f"{rate:.1f} updates/s · loss {metrics.get('loss', math.nan):.4g}"
            self._display.progress(trainer.step, rate, status)

    def on_train_end(self, trainer: Trainer) -> None:  # noqa: ARG002
        if self._display is not None:
            self._display.close()
            self._display = None


class Trainer:
    """Trains a world model on recorded episodes, by `compute_loss` and AdamW; or an agent, by its own `update`.

    An agent (`create_agent`, `load_agent`) learns as published, its policy and values included: batch size, window
    length, optimiser and device are then its own, and of `config` only steps, intervals and seed are used. Make its
    buffer with `ReplayBuffer(…, windows=agent.windows, columns=agent.columns)`.

    The same seed, model and buffer give the same training; a loaded checkpoint goes on exactly where it was saved.
    callbacks: None shows progress. Raises TypeError for an object that is no model, TypeError or ValueError for wrong
    callbacks.
    """

    def __init__(
        self,
        model: WorldModel | Agent,
        config: TrainingConfig | None = None,
        callbacks: Sequence[Callback] | None = None,
    ) -> None:
        self.config = config or TrainingConfig()
        self.callbacks = [ProgressCallback()] if callbacks is None else list(callbacks)
        check_callbacks(self.callbacks)
        self.step = 0
        self._learner = make_learner(model, self.config)
        self._stopping = False

    @property
    def model(self) -> WorldModel:
        return self._learner.model

    @property
    def device(self) -> torch.device:
        return self._learner.device

    def train(self, buffer: ReplayBuffer, validation: ReplayBuffer | None = None) -> dict[str, float]:
        """Update until config.total_steps, an early stop or Ctrl-C; return the last logged means, "eval/…" included.

        validation: held-out episodes for `evaluate`. Raises ValueError if a buffer does not fit the model or holds
        no sequence that is long enough, before anything is trained; FloatingPointError for a NaN loss;
        CallbackError for a failing callback.
        """
        for checked in (buffer, validation):
            if checked is not None:
                self._learner.check(checked)
        self._stopping = False
        last: dict[str, float] = {}
        with GracefulStop() as stop:
            try:
                self._call("on_train_begin")
                sums: dict[str, list[float]] = defaultdict(list)
                while self.step < self.config.total_steps and not (self._stopping or stop.requested):
                    metrics = self._update(buffer)
                    for name, value in metrics.items():
                        sums[name].append(value)
                    self._call("on_step", metrics)
                    last.update(self._report(sums, validation))
            except BaseException:
                self._end(quietly=True)
                raise
            self._end()
        return last

    def _update(self, buffer: ReplayBuffer) -> dict[str, float]:
        with self._randomness(LEARNING, self.step) as draws:
            metrics = self._learner.update(buffer, draws, self.step)
        self.step += 1
        return metrics

    def _report(self, sums: dict[str, list[float]], validation: ReplayBuffer | None) -> dict[str, float]:
        """Log and evaluate if due; return the metrics."""
        c, reported, done = self.config, {}, self.step >= self.config.total_steps
        if done or self.step % c.log_interval == 0:
            means = {name: float(np.mean(values)) for name, values in sums.items()}
            sums.clear()
            self._call("on_log", means)
            reported.update(means)
        if validation is not None and (done or (c.eval_interval and self.step % c.eval_interval == 0)):
            found = {f"eval/{name}": value for name, value in self.evaluate(validation).items()}
            self._call("on_evaluate", found)
            reported.update(found)
        return reported

    def evaluate(self, buffer: ReplayBuffer, batches: int | None = None) -> dict[str, float]:
        """Return the mean losses over `batches` batches (None: config.eval_batches), without learning.

        Sequences and noise are the same every time, so that two evaluations differ only by the model.
        """
        self._learner.check(buffer)
        count = self.config.eval_batches if batches is None else batches
        if count < 1:
            raise ValueError(f"evaluate: batches is {count}, expected at least 1.")
        with self._randomness(EVALUATION, 0) as draws, torch.no_grad():
            losses = [self._learner.losses(buffer, draws) for _ in range(count)]
        return {name: float(np.mean([loss[name] for loss in losses])) for name in losses[0]}

    @contextmanager
    def _randomness(self, purpose: int, step: int) -> Iterator[np.random.Generator]:
        """Yield a generator for drawing sequences, with torch seeded for the model's noise. Both depend only on the
        seed, `purpose` and `step`, so that a checkpoint does not need to save them."""
        entropy = [self.config.seed, purpose, step]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
            yield np.random.default_rng(entropy)

    def stop(self) -> None:
        """End the training after the current update."""
        self._stopping = True

    def save_checkpoint(self, directory: str | os.PathLike[str]) -> Path:
        """Write model, optimiser, step and generators; `create_world_model(directory)` reads the model alone.

        All of it is written or nothing: an earlier checkpoint there stays until the new one is complete. Raises
        FloatingPointError if parameters are NaN or infinite, and ValueError if the directory holds anything else than
        an earlier checkpoint; both before anything is written.
        """
        final = Path(directory)
        partial = final.with_name(final.name + ".partial")
        self._learner.check_finite()
        check_replaceable(final)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        self._learner.save(partial)
        write_msgpack(partial / "trainer.msgpack", {"step": self.step, "learner": self._learner.state_dict()})
        self.config.save(partial / "training.json")
        write_manifest(partial, {"files": {path.name: checksum_of(path) for path in sorted(partial.iterdir())}})
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        self._call("on_checkpoint", final)
        return final

    def load_checkpoint(self, directory: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint of the same model; the config stays this trainer's.

        Raises CheckpointError if it is missing, damaged or of another model.
        """
        folder = Path(directory)
        if not (folder / "trainer.msgpack").is_file():
            raise CheckpointError(f"{folder} holds no checkpoint of a Trainer, expected one from save_checkpoint.")
        if (folder / MANIFEST).is_file() and (damage := find_damage(folder)):
            raise CheckpointError(f"{folder} is damaged: {'; '.join(damage)}. Use an earlier checkpoint.")
        state = read_msgpack(folder / "trainer.msgpack")
        try:
            self._learner.load(folder, state["learner"])
            self.step = int(state["step"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{folder} is of another version or damaged: {error}") from error

    def _end(self, quietly: bool = False) -> None:
        """Call on_train_end of every callback. quietly: ignore their errors, because another error is being raised."""
        for callback in self.callbacks:
            try:
                self._call("on_train_end", only=callback)
            except CallbackError:
                if not quietly:
                    raise

    def _call(self, event: str, *arguments: Any, only: Callback | None = None) -> None:
        for callback in self.callbacks if only is None else [only]:
            try:
                getattr(callback, event)(self, *arguments)
            except CallbackError:
                raise
            except Exception as error:
                name = type(callback).__name__
                raise CallbackError(
                    f"callback {name} failed in {event} after update {self.step}: {type(error).__name__}: {error}"
                ) from error


def check_replaceable(directory: Path) -> None:
    """Raise ValueError if the directory holds what is no part of a checkpoint of a Trainer, and would be lost."""
    if not directory.exists():
        return
    known = {MANIFEST, "trainer.msgpack", "training.json", "model.safetensors", "behaviour.safetensors", "config.json"}
    if other := sorted(path.name for path in directory.iterdir() if path.is_dir() or path.name not in known):
        raise ValueError(
            f"save_checkpoint: {directory} holds {other[0]!r}, which is no part of a checkpoint and would be lost. "
            "Give a new directory, or one that holds an earlier checkpoint alone."
        )


def train(
    model: WorldModel | Agent,
    buffer: ReplayBuffer,
    validation: ReplayBuffer | None = None,
    callbacks: Sequence[Callback] | None = None,
    **fields: Any,
) -> Trainer:
    """Train a model on recorded episodes in one line: train(model, buffer, total_steps=10_000).

    fields: fields of TrainingConfig. Returns the trainer, for evaluate and save_checkpoint. Raises the errors of
    Trainer and Trainer.train.
    """
    trainer = Trainer(model, TrainingConfig(**fields), callbacks)
    trainer.train(buffer, validation)
    return trainer
