"""The coordinator: the only loop of the Ray runtime. It runs in the driver and moves references, not data."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from distributed.actors import EnvActor, LearnerActor, ReplayActor
from distributed.cluster import connect, share
from distributed.metrics import RayGauges
from worldloom.catalog import agent_from_description
from worldloom.envs import EnvironmentFailed
from worldloom.training.assembly import (
    AgentSpec,
    actor_seed,
    make_run_env,
    probe_env,
    replay_columns,
    start_run_evaluation,
)
from worldloom.training.checkpoint import begin_checkpoint, commit_checkpoint, newest_checkpoint
from worldloom.training.chunk import ChunkInfo, row_bytes
from worldloom.training.config import RunConfig
from worldloom.training.evaluation import Evaluation
from worldloom.training.interrupt import GracefulStop
from worldloom.training.pictures import PICTURE_ROWS
from worldloom.training.rollout import Rollout
from worldloom.training.run import Run

BUNDLE_BYTES = 4 * 2**20  # batches of a task together hold about this much
BUNDLE_UPDATES = 8  # and are at most so many
UPDATES_IN_FLIGHT = 2  # tasks at the learner: one being learned from, one whose batches are on the way
SETTLE_SECONDS = 10.0  # for the last collects of a run; what is later is discarded and counted
EVALUATION = "evaluation"
START_SECONDS = 180.0  # for an actor to come up
RESTARTS_ALLOWED = 5  # of one env actor in a row, without a chunk in between
RECOVERIES_ALLOWED = 5  # of learner and replay, without a checkpoint in between


class ActorLost(RuntimeError):
    """The learner or replay died; `Coordinator.recover` starts it again."""


@dataclass
class Collector:
    """One remote env actor and what it is doing."""

    index: int
    incarnation: int
    handle: Any
    version: int = -1  # of the weights that it holds
    task: Any = None  # reference to the info of the collect, or to the evaluation, that is under way
    chunk: Any = None  # reference to the chunk, or EVALUATION
    requested: int = 0  # environment steps
    since: float = 0.0
    restarts: int = 0


class Coordinator:
    """Starts the actors, hands chunks to replay and batches to the learner, publishes weights, counts and saves."""

    run: Run
    learner: Any = None
    replay: Any = None
    updates_in_flight = UPDATES_IN_FLIGHT

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        self.config, self._run_dir = config, run_dir.resolve()
        self._env_spec = probe_env(config)
        self._namespace = f"worldloom-{self._run_dir.name}"
        self._owns_cluster = connect(config, self._namespace)
        self.collectors: list[Collector] = []
        self.own: Rollout | None = None  # with no env actors
        self.weights: Any = None  # reference to the newest Weights; the coordinator owns it
        self.version = 0
        self.inserts: dict[Any, ChunkInfo] = {}
        self.updates: deque[tuple[Any, Any, Any, int]] = deque()  # results, weights, columns, how many
        self.evaluation_due: int | None = None  # the step at which one fell due
        self.evaluating: int | None = None  # the step that the one under way belongs to
        self._held_since: float | None = None
        self._recoveries = 0  # since the last checkpoint

    # Starting and ending

    def start(self, resume: bool) -> None:
        """Bring up learner and replay, restored from the newest checkpoint if `resume`, then the env actors."""
        self._shares = share(self.config)
        self._spec: AgentSpec = self._start_learner()
        gauges = RayGauges(self._run_dir.name)
        self.run = Run(self.config, self._run_dir, self._env_spec, self._spec, resume, [gauges])
        self.incarnation = self.run.incarnation  # of the actor started last
        self._start_replay()
        if self.run.checkpoint:
            self._load(self.run.checkpoint)
        self.start_collecting()

    def _start_learner(self) -> AgentSpec:
        self.learner = self._start(LearnerActor, "learner", self._shares.cpus, self._shares.gpus)
        threads = self._shares.learner_threads
        opened = self.learner.open.remote(self.config, self._env_spec, threads, self.version)
        spec: AgentSpec = self._wait(opened, "the learner")
        return spec

    def _start_replay(self) -> None:
        self.replay = self._start(ReplayActor, "replay/0", 0, 0)
        self._wait(self.replay.open.remote(self.config, self._env_spec, self._spec, self._run_dir), "replay")

    def _load(self, checkpoint: Path) -> None:
        self._wait(self.learner.load.remote(checkpoint), "the learner")
        self._wait(self.replay.load.remote(checkpoint), "replay")

    def _start(self, kind: type[Any], name: str, cpus: float, gpus: float, *args: Any) -> Any:
        options = {"name": name, "namespace": self._namespace, "num_cpus": cpus, "num_gpus": gpus}
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return ray.remote(kind).options(**options, max_restarts=0, max_task_retries=0).remote(*args)
            except ValueError:  # the name of an actor that was just killed is not free yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _wait(self, reference: Any, who: str) -> Any:
        """The result, or a sentence if the actor does not come up or its constructor failed."""
        try:
            return ray.get(reference, timeout=START_SECONDS)
        except RayTaskError as error:
            raise error.cause from error
        except RayActorError as error:
            raise ActorLost(f"{who} died ({type(error).__name__}).") from error
        except GetTimeoutError:
            raise RuntimeError(
                f"{who} did not start within {START_SECONDS:.0f} s: the cluster has {ray.available_resources()} free. "
                "Free resources, or lower runtime.env_actors."
            ) from None

    def _start_collector(self, index: int, incarnation: int) -> Collector:
        handle = self._start(
            EnvActor, f"env/{index:03d}", self._shares.cpus, 0, self.config, self._spec.description, index, incarnation
        )
        return Collector(index, incarnation, handle)

    def start_collecting(self) -> None:
        self.weights = self.publish()
        for index in range(self.config.runtime.env_actors):
            self.collectors.append(self._start_collector(index, self.incarnation))
        if not self.collectors:
            torch.set_num_threads(1)
            self.own = self.own_rollout()
        where = f"{len(self.collectors)} env actors" if self.collectors else "the coordinator itself"
        self.run.recorder.say(
            f"collecting: {where} x {self.config.env.num_envs} environments; learner: "
            f"{self._shares.learner_threads} threads; {self._shares.cpus:g} logical CPUs a process"
        )

    def own_rollout(self) -> Rollout:
        """Of the coordinator, where there are no env actors."""
        config, seed = self.config, self.config.train.seed
        agent = agent_from_description(self._spec.description, seed=seed)
        env = make_run_env(config.env, config.env.num_envs, actor_seed(config, 0, self.incarnation))
        return Rollout(env, agent, seed, incarnation=self.incarnation)

    def publish(self) -> Any:
        reference = self.learner.publish.remote()
        self.version = self._wait(reference, "the learner").version
        return reference

    def close(self) -> None:
        """End this run's actors, and the cluster if this run started it."""
        for actor in [self.learner, self.replay, *(c.handle for c in self.collectors)]:
            if actor is not None:
                ray.kill(actor)
        if self.own is not None:
            self.own.env.close()
        if self._owns_cluster:
            ray.shutdown()

    # The loop

    def train(self) -> dict[str, Any]:
        """Run to total_steps, or to the first Ctrl-C. Returns what summary.json holds."""
        with GracefulStop() as stop:
            try:
                lost: ActorLost | None = None
                while True:
                    try:
                        if lost is not None:
                            self.recover(lost)
                        return self._run_to_end(stop)
                    except ActorLost as error:
                        lost = error
            except EnvironmentFailed:
                self._settle()
                self.save()  # what was accepted is kept for --resume
                raise
            finally:
                self.run.recorder.close()

    def _run_to_end(self, stop: GracefulStop) -> dict[str, Any]:
        run = self.run
        while not (run.finished and not run.limiter.updates_due()) and not stop.requested:
            self.advance(stop)
            self.at_intervals()
        return self._finish(stop)

    def advance(self, stop: GracefulStop) -> None:  # noqa: ARG002 - of Lockstep
        """Keep everybody busy, and take in whatever is ready."""
        self.dispatch_updates()
        self._dispatch_collects()
        self._receive()

    def dispatch_updates(self) -> None:
        """Keep the learner supplied with bundles of batches, never more than are due."""
        while len(self.updates) < self.updates_in_flight:
            due = self.run.limiter.updates_due() - sum(count for *_, count in self.updates)
            count = min(due, self.bundle())
            if count <= 0:
                return
            batches = self.replay.sample.remote(count)
            results, written, weights = self.learner.update.options(num_returns=3).remote(batches)
            self.updates.append((results, weights, written, count))

    def bundle(self) -> int:
        """Updates in one task: several of small batches, so that calls cost little beside learning."""
        spec = self._spec
        batch = spec.batch_size * spec.windows.length * row_bytes(replay_columns(self._env_spec, spec))
        return max(1, min(BUNDLE_UPDATES, BUNDLE_BYTES // batch))

    def _dispatch_collects(self) -> None:
        """Give idle env actors something to do, unless collecting is too far ahead of learning."""
        self.dispatch_evaluation()
        idle = [c for c in self.collectors if c.task is None]
        held = False
        for collector in idle:
            steps = self.steps_to_collect()
            held = held or (steps > 0 and self.too_far_ahead())
            if steps == 0 or held:
                break
            self.collect(collector, steps)
        self._count_held_time(held)

    def steps_to_collect(self) -> int:
        """Vector steps for the next collect, 0 once total_steps are collected or under way."""
        under_way = sum(c.requested for c in self.collectors) + sum(info.steps for info in self.inserts.values())
        left = self.config.train.total_steps - self.run.limiter.env_steps - under_way
        return max(min(self.config.runtime.chunk_steps, math.ceil(left / self.config.env.num_envs)), 0)

    def too_far_ahead(self) -> bool:
        """Collecting may lead by one round of chunks."""
        actors = max(len(self.collectors), 1)
        return self.run.limiter.steps_ahead() > self.config.runtime.chunk_steps * self.config.env.num_envs * actors

    def collect(self, collector: Collector, steps: int) -> None:
        weights = None if collector.version == self.version else self.weights
        collect = collector.handle.collect.options(num_returns=2, name=f"env/{collector.index:03d}.collect")
        collector.chunk, collector.task = collect.remote(steps, self.run.random_actions, weights)
        collector.version = self.version
        collector.requested = steps * self.config.env.num_envs
        collector.since = time.monotonic()

    def _count_held_time(self, held: bool) -> None:
        now = time.monotonic()
        if self._held_since is not None:
            self.run.recorder.held(now - self._held_since)
        self._held_since = now if held else None

    # What comes back

    def _receive(self) -> None:
        """Take in whatever is ready, waiting for the first."""
        if self.own is not None and self.collect_here():
            self.take_ready(timeout=0)
        else:
            self.take_ready(timeout=1.0)

    def collect_here(self) -> bool:
        """With no env actors, the coordinator collects between two looks at the learner."""
        assert self.own is not None
        steps = self.steps_to_collect()
        held = steps > 0 and self.too_far_ahead()
        self._count_held_time(held)
        if steps == 0 or held:
            return False
        if self.own.version != self.version:
            self.own.load_weights(ray.get(self.weights))
        chunk = self.own.collect(steps, self.run.random_actions, self.config.runtime.chunk_seconds)
        self.inserts[self.replay.insert.remote(chunk)] = chunk.info
        return True

    def take_ready(self, timeout: float) -> None:
        pending = [c.task for c in self.collectors if c.task is not None]
        pending += [*self.inserts, *(results for results, *_ in self.updates)]
        if not pending:
            return
        ready, _ = ray.wait(pending, num_returns=1, timeout=timeout)
        if ready:
            ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
        for reference in ready:
            if reference in self.inserts:
                self._take_insert(reference)
        while self.updates and self.updates[0][0] in ready:
            self._take_update()
        for collector in list(self.collectors):
            if collector.task in ready:
                self.take_collector(collector)
            elif collector.task is not None and self._hangs(collector):
                self.replace(collector, f"gave no answer for {self.config.runtime.collect_timeout:g} s")

    def _hangs(self, collector: Collector) -> bool:
        return time.monotonic() - collector.since > self.config.runtime.collect_timeout

    def _take_insert(self, reference: Any) -> None:
        accepted = self.of_actor(reference, "replay/0")
        info = self.inserts.pop(reference)
        self.run.limiter.env_steps = max(accepted.steps, self.run.limiter.env_steps)
        self.run.recorder.chunk(info, self.version)

    def _take_update(self, write_back: bool = True) -> None:
        results, weights, written = self.updates.popleft()[:3]
        result = self.of_actor(results, "learner")
        self.run.limiter.updates += result.updates
        self.run.recorder.updated(result.metrics, result.updates, result.seconds)
        if result.published is not None:
            self.weights, self.version = weights, result.published
        if self._spec.columns and write_back:
            self.of_actor(self.replay.write_back.remote(written), "replay/0")

    def take_collector(self, collector: Collector) -> None:
        reference, chunk = collector.task, collector.chunk
        try:
            result = ray.get(reference)
        except RayActorError as error:
            self.replace(collector, f"died ({type(error).__name__})", error)
            return
        except RayTaskError as error:
            collector.task = None
            if chunk is not EVALUATION:
                ray.wait([chunk])  # it carries the same error, which would be reported as unread
            raise error.cause from error
        if chunk is EVALUATION and result is None:  # episodes are left to play
            collector.task, collector.since = collector.handle.evaluate.remote(None), time.monotonic()
            return
        collector.task, collector.chunk, collector.requested, collector.restarts = None, None, 0, 0
        if chunk is EVALUATION:
            env_steps, self.evaluating = self.evaluating, None
            self.run.recorder.evaluated(env_steps or 0, result)
        else:
            self.inserts[self.replay.insert.remote(chunk)] = result

    def of_actor(self, reference: Any, who: str) -> Any:
        """A result of the learner or of replay; what they raise ends the run. Raises ActorLost if one of them died."""
        try:
            return ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, RayActorError):  # of an actor that it was to get something from
                raise ActorLost(f"what {who} was to work on was lost ({type(error.cause).__name__}).") from error
            raise error.cause from error
        except RayActorError as error:
            raise ActorLost(f"{who} died ({type(error).__name__}).") from error

    def recover(self, lost: ActorLost) -> None:
        """Start learner or replay again from the newest checkpoint, and count what was lost since.

        Raises RuntimeError with the resume command where that happens again and again.
        """
        self._recoveries += 1
        if self._recoveries > RECOVERIES_ALLOWED:
            raise RuntimeError(
                f"{lost} That was loss {self._recoveries} of learner or replay since the last checkpoint, which is "
                f"intact; go on with: {self.run.resume_command()}"
            ) from lost
        begun = time.monotonic()
        saved = sorted(self.run.dir.resolve().glob("checkpoints/step-*/manifest.json"))
        checkpoint = newest_checkpoint(self.run.dir.resolve()) if saved else None
        source = checkpoint.name if checkpoint else "the beginning"
        told = []
        if not self._alive(self.learner):
            ray.kill(self.learner)  # sets its name free
            self.updates.clear()
            self._start_learner()
            done = self._wait(self.learner.load.remote(checkpoint), "the learner") if checkpoint else 0
            self.weights = self.publish()
            told.append(f"learner died; started again from {source}, {self._count_lost_updates(done)} updates lost")
        if not self._alive(self.replay):
            discarded = self._recover_replay(checkpoint)
            told.append(f"replay/0 died; started again from {source}, {discarded} steps discarded")
        self.run.recorder.counters["actor_restarts"] += len(told)
        self.run.recorder.say(f"{'; '.join(told) or lost} ({time.monotonic() - begun:.1f} s)")

    def _alive(self, handle: Any) -> bool:
        try:
            ray.get(handle.pid.remote(), timeout=START_SECONDS)
            return True
        except RayActorError:
            return False

    def _count_lost_updates(self, done: int) -> int:
        """`done` updates are in the learner again. They are not made up for: the limiter counts what was delivered."""
        lost = self.run.limiter.updates - done - self.run.recorder.counters["updates_lost"]
        self.run.recorder.counters["updates_lost"] += lost
        return lost

    def _recover_replay(self, checkpoint: Path | None) -> int:
        """Every episode starts anew, since the rows that open ones had are gone. Returns the steps that were lost."""
        while self.updates:  # those whose batches were drawn in time are done
            try:
                self._take_update(write_back=False)
            except ActorLost:
                continue
        ray.kill(self.replay)  # sets its name free
        self._start_replay()
        before = self.run.limiter.env_steps + sum(info.steps for info in self.inserts.values())
        before += sum(c.requested for c in self.collectors)
        self.inserts.clear()
        accepted = self._wait(self.replay.load.remote(checkpoint), "replay") if checkpoint else None
        self.run.limiter.env_steps = accepted.steps if accepted else 0
        lost = before - self.run.limiter.env_steps
        self.run.recorder.counters["env_steps_discarded"] += lost
        self.restart_collecting()
        return lost

    def restart_collecting(self) -> None:
        """Start all episodes anew, in actors that live on."""
        self.incarnation += 1
        if self.own is not None:
            self.own.env.close()
            self.own = self.own_rollout()
        if self.evaluating is not None:
            self.evaluation_due, self.evaluating = self.evaluating, None
        for collector in self.collectors:  # what is under way ends before the restart, and is not taken in
            collector.task, collector.chunk, collector.requested = None, None, 0
            restarted = collector.handle.restart.remote(self.incarnation)
            try:
                ray.get(restarted, timeout=self.config.runtime.collect_timeout)
            except (RayActorError, GetTimeoutError) as error:
                self.replace(collector, f"could not start anew ({type(error).__name__})", error)
            else:
                collector.incarnation, collector.version = self.incarnation, -1

    def replace(self, collector: Collector, why: str, error: Exception | None = None) -> None:
        """Start a lost env actor anew; it gets the newest weights before it acts."""
        if collector.restarts >= RESTARTS_ALLOWED:
            raise RuntimeError(
                f"env/{collector.index:03d} was lost {RESTARTS_ALLOWED + 1} times in a row without finishing a "
                f"collect; the last time it {why}. Look for an environment that kills or blocks its process."
            ) from error
        ray.kill(collector.handle)
        counters = self.run.recorder.counters
        counters["actor_restarts"] += 1
        counters["env_steps_discarded"] += collector.requested
        if collector.chunk is EVALUATION:  # it was evaluating: do that again
            self.evaluation_due, self.evaluating = self.evaluating, None
        self.incarnation += 1
        self.run.recorder.say(
            f"env/{collector.index:03d} {why}; started again, at most {collector.requested} steps discarded"
        )
        fresh = self._start_collector(collector.index, self.incarnation)
        fresh.restarts = collector.restarts + 1
        self.collectors[collector.index] = fresh

    # Intervals

    def at_intervals(self) -> None:
        run, steps = self.run, self.run.limiter.env_steps
        if run.log_clock.due(steps):
            run.recorder.log()
        if run.picture_clock.due(steps) and not run.finished:
            self._picture()
        if run.eval_clock.due(steps) and not run.finished:
            self.evaluation_due = steps
        if run.checkpoint_clock.due(steps) and not run.finished:
            self._settle()
            self.save()
            self.after_checkpoint()

    def dispatch_evaluation(self) -> None:
        if self.evaluation_due is None or self.evaluating is not None:
            return
        if self.own is not None:
            steps, self.evaluation_due = self.evaluation_due, None
            self.run.recorder.evaluated(steps, self._evaluate_here())
            return
        collector = next((c for c in self.collectors if c.task is None), None)
        if collector is not None:
            collector.task, collector.chunk = collector.handle.evaluate.remote(self.weights), EVALUATION
            collector.since, collector.version = time.monotonic(), self.version
            self.evaluating, self.evaluation_due = self.evaluation_due, None

    def _evaluate_here(self) -> Evaluation:
        assert self.own is not None
        self.own.load_weights(ray.get(self.weights))
        return start_run_evaluation(self.config, self.own.agent).finish()

    def _settle(self, collects: bool = False) -> None:
        """Take in every update and insert under way, so that counters, learner and replay agree."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while self.updates or self.inserts or (collects and self._collecting()):
            self.take_ready(timeout=1.0)
            if collects and time.monotonic() > deadline and not (self.updates or self.inserts):
                self.run.recorder.counters["env_steps_discarded"] += sum(c.requested for c in self.collectors)
                return

    def _collecting(self) -> bool:
        return any(c.task is not None and c.chunk is not EVALUATION for c in self.collectors)

    def _picture(self) -> None:
        sequence = self.replay.draw_sequence.remote(PICTURE_ROWS, self.run.limiter.env_steps)
        picture = self.learner.picture.remote(sequence, self.run.title())
        self.run.recorder.picture(self.of_actor(picture, "learner"))

    def save(self) -> None:
        """Write a checkpoint of everything; call `_settle` before."""
        partial = begin_checkpoint(self.run.dir.resolve(), self.run.limiter.env_steps)
        learner = self.learner.save.remote(partial)
        replay = self.replay.save.remote(partial, self.config.runtime.sync)
        self.of_actor(learner, "learner")
        rows = self.of_actor(replay, "replay/0")
        commit_checkpoint(partial, self.run.manifest(rows, self.incarnation), self.config.checkpoint.keep)
        self._recoveries = 0

    def after_checkpoint(self) -> None:
        """Nothing: collecting goes on across it."""

    def _finish(self, stop: GracefulStop) -> dict[str, Any]:
        self._settle(collects=True)
        self.save()
        self._picture()
        finished = self.run.finished and self._final_evaluation(stop)
        evaluation = self.run.recorder.last_evaluation if finished else None
        return self.run.recorder.summarise("completed" if finished else "interrupted", self._spec.device, evaluation)

    def _final_evaluation(self, stop: GracefulStop) -> bool:
        """With the newest weights; False if it was interrupted."""
        self.weights = self.publish()
        self.evaluation_due = self.run.limiter.env_steps
        while self.evaluation_due is not None or self.evaluating is not None:
            if stop.requested:
                return False
            self.dispatch_evaluation()
            self.take_ready(timeout=1.0)
        return True


def train(config: RunConfig, run_dir: Path, resume: bool = False) -> dict[str, Any]:
    """A whole run on Ray. Returns what summary.json holds; whatever happens, no actor is left behind."""
    from distributed.lockstep import Lockstep

    coordinator = Lockstep(config, run_dir) if config.runtime.sync else Coordinator(config, run_dir)
    try:
        coordinator.start(resume)
        return coordinator.train()
    finally:
        coordinator.close()
