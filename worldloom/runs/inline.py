"""The in-process trainer: the whole loop in one place, without Ray."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch

from worldloom.acting.evaluation import Evaluation
from worldloom.acting.local import LocalActing
from worldloom.acting.rollout import Lane, Rollout
from worldloom.envs import EnvironmentFailed
from worldloom.interrupt import GracefulStop
from worldloom.report.pictures import PICTURE_ROWS, show_sequence
from worldloom.runs.agent_state import load_agent_state, rescue_agent, take_agent, write_agent
from worldloom.runs.build import (
    RunEvaluation,
    actor_seed,
    agent_spec,
    choose_device,
    make_replay,
    make_run_agent,
    make_run_env,
    probe_env,
)
from worldloom.runs.checkpoint import checkpoint_to_resume
from worldloom.runs.config import RunConfig
from worldloom.runs.home import Home, as_home
from worldloom.runs.rows import ReplayStore
from worldloom.runs.run import Run
from worldloom.types import Array, FreshColumns

COLLECT_EVERY = 100  # updates on a GPU, because reading metrics waits for the GPU
SAID_AFTER = 10.0  # seconds of an evaluation, after which the user is told of it


class InlineTrainer:
    """Collects, replays and learns in this process, one vector step at a time."""

    def __init__(self, config: RunConfig, run_dir: str | os.PathLike[str] | Home, resume: bool = False) -> None:
        if config.runtime.learner_threads:
            torch.set_num_threads(config.runtime.learner_threads)
        home, env = as_home(run_dir), probe_env(config)
        seed = config.train.seed
        self.config = config
        self.agent = make_run_agent(config, env, choose_device(config.train.device), seed)
        spec = agent_spec(self.agent)
        checkpoint = checkpoint_to_resume(home.root, config.replay.shards) if resume else None
        self.replay = make_replay(config, env, spec)
        self.store = ReplayStore(home.root, compress=config.checkpoint.compress)
        rows_lost = 0
        if checkpoint:
            load_agent_state(checkpoint, self.agent)
            rows_lost = self.store.load(checkpoint, self.replay)
        self.run = Run(config, home, env, spec, checkpoint)
        self.run.limiter.drawable = self.replay.num_windows > 0
        self.run.recorder.rows_lost(rows_lost)
        self._on_gpu = torch.device(self.run.spec.device).type == "cuda"
        self._fresh: tuple[Array, FreshColumns] | None = None
        self._uncollected, self._learning_seconds = 0, 0.0
        self.rollout = self._new_rollout()

    def _new_rollout(self) -> Rollout:
        config, incarnation = self.config, self.run.incarnation
        envs = make_run_env(config.env, config.env.num_envs, actor_seed(config, 0, incarnation))
        lane = Lane(envs, LocalActing(self.agent))
        return Rollout([lane], config.train.seed, incarnation=incarnation)

    def train(self) -> dict[str, Any]:
        """Run to total_steps, or to the first Ctrl-C. Return the content of summary.json."""
        run, limiter = self.run, self.run.limiter
        with GracefulStop() as stop:
            try:
                while not run.finished and not stop.requested:
                    chunk = self.rollout.collect(1, run.random_actions)
                    accepted = self.replay.insert(chunk)
                    limiter.env_steps, limiter.drawable = accepted.steps, accepted.windows > 0
                    run.recorder.chunk(chunk.info, 0)
                    self._learn(stop)
                    if run.log_clock.due(limiter.env_steps):
                        self._collect()
                        run.recorder.log()
                    if run.picture_clock.due(limiter.env_steps) and not run.finished:
                        self._picture()
                    if run.eval_clock.due(limiter.env_steps) and not run.finished:
                        self._evaluate(stop)
                    if run.checkpoint_clock.due(limiter.env_steps) and not run.finished:
                        self.save()
                        if self.config.runtime.sync:  # restart all episodes, as a resumed run would
                            self.rollout.close()
                            run.incarnation += 1
                            self.rollout = self._new_rollout()
                return self._finish(stop)
            except EnvironmentFailed:
                self.save()  # keep the accepted rows for --resume
                raise
            finally:
                run.recorder.close()
                self.rollout.close()

    def _learn(self, stop: GracefulStop) -> None:
        """Make the updates that are due; write back the replay columns that they computed."""
        limiter = self.run.limiter
        while limiter.updates_due() and not stop.requested:
            begun = time.monotonic()
            batch = self.replay.sample(self.agent.batch_size)
            fresh = (batch["rows"].numpy(), self.agent.learn(batch))
            if self._on_gpu:  # the columns of the previous update are ready by now
                self._write_back()
            self._fresh = fresh
            if not self._on_gpu:
                self._write_back()
            limiter.updates += 1
            self._uncollected += 1
            self._learning_seconds += time.monotonic() - begun
            if not self._on_gpu or self._uncollected >= COLLECT_EVERY:
                self._collect()

    def _write_back(self) -> None:
        """Write the columns of the last update to replay, if that was not done yet."""
        if self._fresh is not None:
            rows, fresh = self._fresh
            if columns := fresh.arrays():
                self.replay.write_back(rows, columns)
            self._fresh = None

    def _collect(self) -> None:
        """Record the metrics of the updates since the last call; waits for the device."""
        if not self._uncollected:
            return
        begun = time.monotonic()
        metrics = self.agent.collect()
        seconds = self._learning_seconds + time.monotonic() - begun
        self.run.recorder.updated(metrics, self._uncollected, seconds)
        self._uncollected, self._learning_seconds = 0, 0.0

    def _evaluate(self, stop: GracefulStop) -> Evaluation | None:
        """Evaluate and record the result; return None if Ctrl-C came first, since an evaluation may take minutes."""
        steps, recorder = self.run.limiter.env_steps, self.run.recorder
        evaluation, begun, said = RunEvaluation(self.config, self.agent), time.monotonic(), False
        while not stop.requested:
            if result := evaluation.play(1.0):
                recorder.evaluated(steps, result)
                return result
            if not said and time.monotonic() - begun > SAID_AFTER:
                recorder.say(f"step {steps:,}: evaluating over {self.config.eval.episodes} episodes …")
                said = True
        return None

    def _picture(self) -> None:
        sequence = self.replay.draw_sequence(PICTURE_ROWS, np.random.default_rng(self.run.limiter.env_steps))
        self.run.recorder.picture(show_sequence(self.agent.world_model, sequence, self.run.title()))

    def save(self) -> None:
        """Write a checkpoint of everything; a disk error ends the run only if checkpoint.on_error is stop."""
        self._collect()
        self._write_back()
        snapshot = take_agent(self.agent)
        manifest = self.run.manifest(self.run.incarnation)
        with self.run.saving():
            folder = self.run.open_checkpoint(self.run.limiter.env_steps)
            try:
                files = write_agent(folder, snapshot)
                saved = self.store.save(folder, self.replay, self.config.runtime.sync)
                self.run.commit_checkpoint(folder, manifest | {"rows": [saved.rows], "files": files | saved.files})
            except OSError:
                self.run.drop_checkpoint(folder)
                raise

    def _finish(self, stop: GracefulStop) -> dict[str, Any]:
        self.save()
        if self.run.unsaved:
            self.run.end_unsaved(rescue_agent(self.run.dir, take_agent(self.agent)))
        evaluation = self._evaluate(stop) if self.run.finished else None
        self._picture()
        return self.run.recorder.summarise(self.run.status(evaluation is not None), self.run.spec.device, evaluation)
