"""The coordinator: the only loop of the Ray runtime. It runs in the driver and moves references, not data."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from distributed.cluster import check_object_store, connect, ray_log, share
from distributed.free_running import FreeRunning
from distributed.gauges import Gauges
from distributed.launcher import ActorLost, Launcher
from distributed.lockstep import Lockstep
from distributed.metrics import RayGauges
from distributed.parts import Parts
from distributed.recovery import Recovery
from distributed.shards import Shards
from distributed.state import State
from worldloom.envs import EnvironmentFailed
from worldloom.interrupt import GracefulStop, sigterm_stops_at_once
from worldloom.manifest import read_manifest
from worldloom.runs.build import probe_env
from worldloom.runs.checkpoint import checkpoint_to_resume
from worldloom.runs.config import RunConfig
from worldloom.runs.home import Home, as_home
from worldloom.runs.run import Run


class Coordinator:
    """Starts the actors, keeps them at work to the end of the run, and does what is due at intervals."""

    def __init__(self, config: RunConfig, run_dir: str | os.PathLike[str] | Home) -> None:
        self.config, self._home = config, as_home(run_dir)
        env = probe_env(config)
        namespace = f"worldloom-{self._home.root.name}-{secrets.token_hex(3)}"  # two runs may have one name
        self._owns_cluster = connect(config, namespace, str(self._home.root))
        pace: type[Lockstep] | type[FreeRunning] = Lockstep if config.runtime.sync else FreeRunning
        launcher = Launcher(namespace)
        self.parts = Parts(
            State(config, env, launcher, pace.limits(config)), Shards(launcher, config, env, self._home.root)
        )
        self._recovery = Recovery(self.parts)
        self.pace = pace(self.parts, self._recovery)
        self._gauges = Gauges(self.parts.state, self.parts.replay, self.parts.checkpoints)

    @property
    def run(self) -> Run:
        """The run's directory, limiter, intervals and recorder, once `start` is done."""
        return self.parts.state.run

    def start(self, resume: bool) -> None:
        """Start learner and replay, restored from the newest checkpoint if `resume`, then the env actors."""
        parts, state = self.parts, self.parts.state
        checkpoint = checkpoint_to_resume(self._home.root, self.config.replay.shards) if resume else None
        state.shares = share(self.config)
        parts.replay.launch()
        parts.learning.start()
        batches = parts.learning.updates_per_task() * state.limits.updates_in_flight
        check_object_store(parts.learning.node, parts.learning.batch_bytes(), batches)
        parts.replay.start(state.spec, parts.learning.ranks.nodes, state.watch)
        rows_lost = self._restore(checkpoint) if checkpoint else 0
        gauges = RayGauges(self._home.root.name)
        state.run = Run(self.config, self._home, state.env, state.spec, checkpoint, [gauges])
        parts.replay.count(state.run.limiter)
        state.run.recorder.rows_lost(rows_lost)
        state.incarnation = state.run.incarnation
        parts.serving.start()
        parts.learning.publish()
        state.run.recorder.say(state.shares.describe(self._owns_cluster))
        if learners := parts.learning.describe():
            state.run.recorder.say(learners)
        parts.collecting.start()

    def _restore(self, checkpoint: Path) -> int:
        """Load learner and replay; return how many rows are lost with damaged files."""
        self.parts.learning.load(checkpoint)
        rows_lost = self.parts.replay.load(checkpoint)
        self.parts.replay.load_state_dict(read_manifest(checkpoint).get("replay"))
        return rows_lost

    def train(self) -> dict[str, Any]:
        """Run to total_steps, or to the first Ctrl-C. Return what summary.json holds."""
        with GracefulStop() as stop:
            self.parts.evaluating.stop = stop
            try:
                lost: ActorLost | None = None
                while True:
                    try:
                        if lost is not None:
                            self._recovery.recover(lost)
                        return self._run_to_end(stop)
                    except ActorLost as error:
                        lost = error
            except EnvironmentFailed:
                self._save_what_was_accepted()
                raise
            finally:
                self.run.recorder.close()

    def _run_to_end(self, stop: GracefulStop) -> dict[str, Any]:
        run = self.run
        while not (run.finished and not run.limiter.updates_due()) and not stop.requested:
            self.pace.advance(stop)
            self._at_intervals()
        return self._finish(stop)

    def _at_intervals(self) -> None:
        run, steps = self.run, self.run.limiter.env_steps
        if run.log_clock.due(steps):
            self._gauges.record()
            run.recorder.log()
        if run.picture_clock.due(steps) and not run.finished:
            self.parts.learning.draw_picture()
        if run.eval_clock.due(steps) and not run.finished:
            self.parts.evaluating.due = steps
        self._save_at_intervals()
        self.pace.after_interval()

    def _save_at_intervals(self) -> None:
        run, checkpoints = self.run, self.parts.checkpoints
        checkpoints.due |= run.checkpoint_clock.due(run.limiter.env_steps)
        # The next one waits for a slow store, and training goes on; only runtime.sync saves at exactly these steps.
        busy = checkpoints.saving is not None and not self.config.runtime.sync
        if checkpoints.due and not busy and not run.finished:
            self.parts.begin_checkpoint()
            self.pace.after_checkpoint()

    def _finish(self, stop: GracefulStop) -> dict[str, Any]:
        parts, recorder = self.parts, self.run.recorder
        if stop.requested:  # every actor ends after its current step
            parts.learning.ranks.interrupt()
            for collector in parts.collecting.collectors:
                collector.handle.interrupt.remote()
        parts.settle(collects=True)
        parts.save()
        if self.run.unsaved:
            self.run.end_unsaved(parts.learning.rescue(self._home.dir))
        parts.learning.draw_picture()
        parts.learning.finish_picture()
        finished = self.run.finished and self._evaluate_at_the_end()
        evaluation = recorder.last_evaluation if finished else None
        return recorder.summarise(self.run.status(finished), parts.state.spec.device, evaluation)

    def _evaluate_at_the_end(self) -> bool:
        """Evaluate the newest weights; return False if it was interrupted."""
        self.parts.learning.publish()
        self.parts.evaluating.due = self.run.limiter.env_steps
        return self.parts.finish_evaluations()

    def _save_what_was_accepted(self) -> None:
        try:
            self.parts.save_what_was_accepted()
        except ActorLost as error:
            self.run.recorder.say(f"the last checkpoint stands: {error}")

    def close(self) -> None:
        """End this run's actors, and the cluster if this run started it."""
        self._gauges.close()
        self.parts.end()
        if self._owns_cluster:
            ray.shutdown()


def train(
    config: RunConfig,
    run_dir: str | os.PathLike[str] | Home,
    resume: bool = False,
    on_start: Callable[[Run], None] = lambda run: None,
) -> dict[str, Any]:
    """Train a whole run on Ray. Return what summary.json holds; whatever happens, no actor is left behind.

    on_start: called with the run once everything is up, and restored if `resume`, before the first step.
    """
    home = as_home(run_dir)
    with ray_log(home.dir / "ray.log"):
        coordinator = Coordinator(config, home)
        try:
            print("starting the learner, replay and env actors …", flush=True)
            with sigterm_stops_at_once():  # Ray's own handler ends the process with a stack trace
                coordinator.start(resume)
                on_start(coordinator.run)
            return coordinator.train()
        finally:
            coordinator.close()
