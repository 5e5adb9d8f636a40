"""The coordinator: the only loop of the Ray runtime. It runs in the driver and moves references, not data."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import ObjectLostError, RayTaskError

from distributed.acting import InferenceActor, acts_on_server, serving
from distributed.actors import EnvActor, LearnerActor
from distributed.cluster import check_object_store, connect, share
from distributed.collector import EVALUATION, Collector
from distributed.launcher import DEATHS, START_SECONDS, ActorLost, Launcher, alive, reason, result_of
from distributed.metrics import ObjectStore, RayGauges
from distributed.recovery import Recovery
from distributed.saving import Saving
from distributed.shards import ChunkLost, Shards
from worldloom.acting.rollout import ActingLost
from worldloom.envs import EnvironmentFailed
from worldloom.replay.chunk import ChunkInfo, row_bytes
from worldloom.report.pictures import PICTURE_ROWS
from worldloom.runs.build import EVAL_SEED, AgentSpec, probe_env, replay_columns
from worldloom.runs.checkpoint import checkpoint_to_resume, read_manifest
from worldloom.runs.config import RunConfig
from worldloom.runs.interrupt import GracefulStop
from worldloom.runs.run import Run

BUNDLE_BYTES = 4 * 2**20  # batches of a task together hold about this much
BUNDLE_UPDATES = 8  # and are at most so many
UPDATES_IN_FLIGHT = 2  # tasks at the learner: one being learned from, one whose batches are on the way
SETTLE_SECONDS = 10.0  # for the last collects of a run; what is later is discarded and counted


@dataclass
class Learning:
    """A task of updates under way at the learner."""

    result: Any  # references to what `LearnerActor.update` returns
    written: Any
    weights: Any
    count: int  # updates
    shard: int  # that the batches came from


class Coordinator:
    """Starts the actors, hands chunks to replay and batches to the learner, publishes weights, counts and saves."""

    run: Run
    replay: Shards
    learner: Any = None
    updates_in_flight = UPDATES_IN_FLIGHT

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        self.config, self._run_dir = config, run_dir.resolve()
        self._env_spec = probe_env(config)
        namespace = f"worldloom-{self._run_dir.name}"
        self._owns_cluster = connect(config, namespace)
        self.launcher = Launcher(namespace)
        self.collectors: list[Collector] = []
        self.own: EnvActor | None = None  # in this process, where there are no others
        self.server: Any = None  # acts for env actors that hold no weights
        self.weights: Any = None  # reference to the newest Weights; the coordinator owns it
        self.version = 0
        self.inserts: dict[Any, ChunkInfo] = {}
        self.updates: deque[Learning] = deque()
        self.evaluation_due: int | None = None  # the step at which one fell due
        self.evaluating: int | None = None  # the step that the one under way belongs to
        self.saving: Saving | None = None  # the checkpoint that is being written
        self.recovery = Recovery(self)
        self._held_since: float | None = None
        self._store = ObjectStore()
        self._spilled = False

    # Starting and ending

    def start(self, resume: bool) -> None:
        """Bring up learner and replay, restored from the newest checkpoint if `resume`, then the env actors."""
        checkpoint = checkpoint_to_resume(self._run_dir, self.config.replay.shards) if resume else None
        self._shares = share(self.config)
        self.replay = Shards(self.launcher, self.config, self._env_spec, self._run_dir)
        self.replay.launch()
        self.spec: AgentSpec = self.start_learner()
        check_object_store(self.learner_node, self.batch_bytes(), self.bundle() * self.updates_in_flight)
        self.replay.start(self.spec, self.learner_node)
        rows_lost = self._restore(checkpoint) if checkpoint else 0
        gauges = RayGauges(self._run_dir.name)
        self.run = Run(self.config, self._run_dir, self._env_spec, self.spec, checkpoint, [gauges])
        self.run.recorder.rows_lost(rows_lost)
        self.incarnation = self.run.incarnation  # of the actor started last
        self.start_server()
        self.start_collecting()

    def _restore(self, checkpoint: Path) -> int:
        """Learner and replay; returns how many rows are lost with damaged files."""
        result_of(self.learner.load.remote(checkpoint), "learner")
        rows_lost = self.replay.load(checkpoint)
        self.replay.load_state_dict(read_manifest(checkpoint).get("replay"))
        return rows_lost

    def start_learner(self) -> AgentSpec:
        threads = {"acting": serving(self.config).clients, "saving": 1, "control": 1}
        shares = self._shares
        self.learner = self.launcher.start(LearnerActor, "learner", cpus=shares.cpus, gpus=shares.gpus, threads=threads)
        opened = self.learner.open.remote(self.config, self._env_spec, shares.learner_threads, self.version)
        spec: AgentSpec = self.launcher.wait(opened, "the learner")
        self.learner_node: str = self.launcher.wait(self.learner.node.remote(), "the learner")
        return spec

    def start_server(self) -> None:
        """Of acting, where env actors do not act themselves; `publish` gives it weights."""
        if not acts_on_server(self.config, self.spec):
            return
        how = serving(self.config)
        if self.config.runtime.acting_server == "learner":
            self.server = self.learner
            self.launcher.wait(self.learner.serve.remote(how, self.incarnation), "the learner")
            return
        self.server = self.launcher.start(
            InferenceActor,
            "inference",
            cpus=self._shares.cpus,
            gpus=self._shares.server_gpus,
            threads={"acting": how.clients},
        )
        opened = self.server.open.remote(self.config, self.spec, how, self.incarnation)
        self.launcher.wait(opened, "the acting server")

    def start_collector(self, index: int) -> Collector:
        """With the incarnation of now."""
        name, served = f"env/{index:03d}", self.server is not None
        handle = self.launcher.start(
            EnvActor,
            name,
            *(self.config, self.spec, index, self.incarnation, served),
            cpus=self._shares.cpus,
            threads={"control": 1},
            where="SPREAD",
        )
        return Collector(index, self.incarnation, handle, handle.node.remote())

    def start_collecting(self) -> None:
        self.publish()
        self._somebody_at = time.monotonic()  # was up last
        for index in range(self.config.runtime.env_actors):
            self.collectors.append(self.start_collector(index))
        if not self.collectors:
            torch.set_num_threads(1)
            self.own = EnvActor(self.config, self.spec, 0, self.incarnation, self.server is not None)
        self.run.recorder.say(self._shares.describe())
        where = f"{len(self.collectors)} env actors" if self.collectors else "the coordinator itself"
        acting = "" if self.server is None else f", acted for by the {self._server_name}"
        self.run.recorder.say(
            f"collecting: {where} x {self.config.env.num_envs} environments{acting}; learner: "
            f"{self._shares.learner_threads} threads"
        )

    @property
    def _server_name(self) -> str:
        return "learner" if self.server is self.learner else "acting server"

    def publish(self) -> None:
        """Newest weights, for whoever acts next."""
        self.weights = self.learner.publish.remote()
        self.version = self.launcher.wait(self.weights, "the learner").version
        self.run.recorder.published(self.version)
        if self.server is not None and self.server is not self.learner:
            self.launcher.wait(self.server.load.remote(self.weights), "the acting server")

    def close(self) -> None:
        """End this run's actors, and the cluster if this run started it."""
        replay = self.replay.handles if hasattr(self, "replay") else []
        server = self.server if self.server is not self.learner else None
        for actor in [self.learner, server, *replay, *(c.handle for c in self.collectors)]:
            if actor is not None:
                self.launcher.end(actor)
        if self.own is not None:
            self.own.close()
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
                            self.recovery.recover(lost)
                        return self._run_to_end(stop)
                    except ActorLost as error:
                        lost = error
            except EnvironmentFailed:
                self._save_what_was_accepted()
                raise
            finally:
                self.run.recorder.close()

    def _save_what_was_accepted(self) -> None:
        """For --resume, while another error is on its way; collects under way may bring the same again."""
        for collector in self.collectors:
            collector.task, collector.requested = None, 0
        try:
            self._settle()
            self.save()
        except ActorLost as error:
            self.run.recorder.say(f"the last checkpoint stands: {error}")

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
        self.recovery.leave_draining_nodes()

    def dispatch_updates(self) -> None:
        """Keep the learner supplied with bundles of batches, never more than are due."""
        while len(self.updates) < self.updates_in_flight:
            due = self.run.limiter.updates_due() - sum(task.count for task in self.updates)
            count = min(due, self.bundle())
            if count <= 0:
                return
            batches, shard = self.replay.sample(count)
            result, written, weights = self.learner.update.options(num_returns=3).remote(batches)
            self.updates.append(Learning(result, written, weights, count, shard))

    def bundle(self) -> int:
        """Updates in one task: several of small batches, so that calls cost little beside learning."""
        return max(1, min(BUNDLE_UPDATES, BUNDLE_BYTES // self.batch_bytes()))

    def batch_bytes(self) -> int:
        """Of one batch of the learner."""
        spec = self.spec
        return spec.batch_size * spec.windows.length * row_bytes(replay_columns(self._env_spec, spec))

    def _dispatch_collects(self) -> None:
        """Give idle env actors something to do, unless collecting is too far ahead of learning."""
        self.dispatch_evaluation()
        idle = [c for c in self.collectors if c.idle]
        self.expect_somebody()
        held = False
        for collector in idle:
            steps = self.steps_to_collect()
            held = held or (steps > 0 and self.too_far_ahead())
            if steps == 0 or held:
                break
            self.collect(collector, steps)
        self._count_held_time(held)

    def expect_somebody(self) -> None:
        """Raises RuntimeError if no env actor comes up in time; the run goes on with those that do."""
        now = time.monotonic()
        if not self.collectors or any(c.node for c in self.collectors):
            self._somebody_at = now
        elif now - self._somebody_at > START_SECONDS:
            raise RuntimeError(
                f"no env actor came up within {START_SECONDS:.0f} s; each asks for {self._shares.cpus:g} CPUs. "
                f"The cluster has {ray.available_resources()} free. Free resources, or lower runtime.env_actors."
            )

    def steps_to_collect(self) -> int:
        """Vector steps for the next collect, 0 once total_steps are collected or under way."""
        under_way = sum(c.requested for c in self.collectors) + sum(info.steps for info in self.inserts.values())
        left = self.config.train.total_steps - self.run.limiter.env_steps - under_way
        return max(min(self.config.runtime.chunk_steps, math.ceil(left / self.config.env.num_envs)), 0)

    def too_far_ahead(self) -> bool:
        """Collecting may lead by one round of chunks, and by what the next update takes."""
        round_of_chunks = self.config.runtime.chunk_steps * self.config.env.num_envs * max(len(self.collectors), 1)
        limiter = self.run.limiter
        return limiter.steps_ahead() > round_of_chunks + 1 / limiter.updates_per_step

    def collect(self, collector: Collector, steps: int) -> None:
        fresh = self.server is not None or collector.version == self.version
        collect = collector.handle.collect.options(num_returns=2, name=f"env/{collector.index:03d}.collect")
        collector.chunk, collector.task = collect.remote(
            steps, self.run.random_actions, None if fresh else self.weights, self.server
        )
        if self.server is None:
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
        weights = result_of(self.weights, "learner") if self.server is None else None
        chunk, info = self.own.collect(steps, self.run.random_actions, weights, self.server)
        self._insert(chunk, info)
        return True

    def _insert(self, chunk: Any, info: ChunkInfo) -> None:
        """chunk: a Chunk, or a reference to one. Raises ActorLost if it ended because nobody acted any more."""
        self.inserts[self.replay.insert(chunk, info.key.actor)] = info
        if info.acting_lost:
            self._blame_server(info.acting_lost)

    def _blame_server(self, why: str) -> None:
        """Raises ActorLost, unless the server that is there now has not been asked yet; one that is silent is ended."""
        if alive(self.server) and "died" in why:
            return
        self.launcher.end(self.server)
        raise ActorLost(why)

    def take_ready(self, timeout: float) -> None:
        pending = [c.task for c in self.collectors if c.task is not None]
        pending += [c.coming for c in self.collectors if c.node is None]
        pending += [*self.inserts, *(task.result for task in self.updates)]
        pending += self.saving.pending() if self.saving else []
        if not pending:
            return
        ready, _ = ray.wait(pending, num_returns=1, timeout=timeout)
        if ready:
            ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
        for reference in ready:
            if reference in self.inserts:
                self._take_insert(reference)
        while self.updates and self.updates[0].result in ready:
            self.take_update()
        if self.saving and self.saving.done(ready):
            self._commit()
        for collector in list(self.collectors):
            if collector.node is None and collector.coming in ready:
                self._take_up(collector)
            elif collector.task in ready:
                self.take_collector(collector)
            elif collector.task is not None and self._hangs(collector):
                self.recovery.replace(collector, f"gave no answer for {self.config.runtime.collect_timeout:g} s")

    def _hangs(self, collector: Collector) -> bool:
        return time.monotonic() - collector.since > self.config.runtime.collect_timeout

    def _take_insert(self, reference: Any) -> None:
        info = self.inserts[reference]
        try:
            self.replay.take_acceptance(reference, info.key.actor)
        except ChunkLost:  # with its actor's node: the actor's next incarnation starts its episodes anew
            self.run.recorder.counters["env_steps_discarded"] += self.inserts.pop(reference).steps
            return
        del self.inserts[reference]
        self.run.limiter.env_steps = self.replay.steps
        self.run.recorder.chunk(info, self.version)

    def take_update(self, write_back: bool = True) -> None:
        """The oldest task under way. Raises ActorLost."""
        task = self.updates.popleft()
        result = result_of(task.result, "learner")
        self.run.limiter.updates += result.updates
        self.run.recorder.updated(result.metrics, result.updates, result.seconds, result.publish_seconds)
        if result.published is not None:
            self.weights, self.version = task.weights, result.published
            self.run.recorder.published(self.version)
            if self.server is not None and self.server is not self.learner:
                self.server.load.remote(self.weights)
        if self.spec.columns and write_back:
            result_of(self.replay.write_back(task.shard, task.written), "replay")

    def _take_up(self, collector: Collector) -> None:
        """It has found its place in the cluster; work waited for that, so that no step is promised in vain."""
        try:
            collector.node = ray.get(collector.coming)
        except DEATHS as error:
            self.recovery.replace(collector, f"did not come up ({type(error).__name__})", error)

    def take_collector(self, collector: Collector) -> None:
        reference, chunk = collector.task, collector.chunk
        try:
            result = ray.get(reference)
        except (RayTaskError, ObjectLostError) as error:  # before deaths: of what it asked another for, it is both
            if collector.evaluating:
                self.evaluation_due, self.evaluating = self.evaluating, None
            else:
                ray.wait([chunk])  # it carries the same error, which would be reported as unread
            collector.task, collector.requested = None, 0
            raise reason(error, f"env/{collector.index:03d}") from error
        except DEATHS as error:
            self.recovery.replace(collector, f"died ({type(error).__name__})", error)
            return
        if collector.evaluating and result is None:  # episodes are left to play
            collector.task, collector.since = collector.handle.evaluate.remote(None), time.monotonic()
            return
        collector.task, collector.chunk, collector.requested, collector.restarts = None, None, 0, 0
        if chunk is EVALUATION:
            env_steps, self.evaluating = self.evaluating, None
            self.run.recorder.evaluated(env_steps or 0, result)
        else:
            self._insert(chunk, result)

    # Intervals

    def at_intervals(self) -> None:
        run, steps = self.run, self.run.limiter.env_steps
        if run.log_clock.due(steps):
            self._gauge()
            run.recorder.log()
        if run.picture_clock.due(steps) and not run.finished:
            self._picture()
        if run.eval_clock.due(steps) and not run.finished:
            self.evaluation_due = steps
        if run.checkpoint_clock.due(steps) and not run.finished:
            self.begin_saving()
            self.after_checkpoint()

    def _gauge(self) -> None:
        """Figures that the actors and the object store know."""
        gauges: dict[str, float] = {**self._store.gauges(), **self.replay.gauges()}
        if self.server is not None:
            gauges |= result_of(self.server.serving_gauges.remote(), "the acting server")
        if gauges.get("plasma/spilled_bytes") and not self._spilled:
            self._spilled = True
            self.run.recorder.say(
                "warning: the object store is too small and spills to disk, which is slow. Start Ray with a larger "
                "object_store_memory, or lower agent.batch_size or runtime.chunk_steps."
            )
        self.run.recorder.gauges(gauges)

    def dispatch_evaluation(self) -> None:
        if self.evaluation_due is None or self.evaluating is not None:
            return
        if self.own is not None:
            try:
                evaluation = self.own.evaluate(result_of(self._begin_evaluation(), "learner"), self.server)
                while evaluation is None:
                    evaluation = self.own.evaluate(None)
            except ActingLost as error:
                raise ActorLost(str(error)) from error
            self.run.recorder.evaluated(self.evaluation_due, evaluation)
            self.evaluation_due = None
            return
        collector = next((c for c in self.collectors if c.idle), None)
        if collector is not None:
            collector.task = collector.handle.evaluate.remote(self._begin_evaluation(), self.server)
            collector.chunk, collector.since = EVALUATION, time.monotonic()
            collector.version = collector.version if self.server is not None else self.version
            self.evaluating, self.evaluation_due = self.evaluation_due, None

    def _begin_evaluation(self) -> Any:
        """A reference to the newest weights, or to their version once the acting server has set them aside."""
        if self.server is None:
            return self.weights
        return self.server.begin_evaluation.remote(self.weights, EVAL_SEED)

    def _settle(self, collects: bool = False) -> None:
        """Take in every update and insert under way, so that counters, learner and replay agree."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while self.updates or self.inserts or (collects and self._collecting()):
            self.take_ready(timeout=1.0)
            if collects and time.monotonic() > deadline and not (self.updates or self.inserts):
                self.run.recorder.counters["env_steps_discarded"] += sum(c.requested for c in self.collectors)
                return

    def _collecting(self) -> bool:
        return any(c.task is not None and not c.evaluating for c in self.collectors)

    def _picture(self) -> None:
        sequence = self.replay.draw_sequence(PICTURE_ROWS, self.run.limiter.env_steps)
        picture = self.learner.picture.remote(sequence, self.run.title())
        self.run.recorder.picture(result_of(picture, "learner"))

    def begin_saving(self) -> None:
        """Take a checkpoint as of now; it is written while the run goes on."""
        self._finish_saving()
        self._settle()
        with self.run.saving():
            self.saving = Saving(self.run.dir.resolve(), self._manifest(), self.learner, self.replay, beside=True)

    def save(self) -> None:
        """Write a checkpoint and wait for it; call `_settle` before."""
        self._finish_saving()
        with self.run.saving():
            self.saving = Saving(self.run.dir.resolve(), self._manifest(), self.learner, self.replay, beside=False)
        self._finish_saving()

    def _manifest(self) -> dict[str, Any]:
        return {**self.run.manifest(self.incarnation), "replay": self.replay.state_dict()}

    def _finish_saving(self) -> None:
        if self.saving:
            self.saving.wait()
            self._commit()

    def _commit(self) -> None:
        assert self.saving is not None
        saving, self.saving = self.saving, None
        with self.run.saving():
            paused = saving.commit(self.config.checkpoint.keep)
            self.run.recorder.gauges({"checkpoint/paused_seconds": paused, "checkpoint/seconds": saving.seconds})
            self.recovery.checkpointed()

    def after_checkpoint(self) -> None:
        """Nothing: collecting goes on across it."""

    def _finish(self, stop: GracefulStop) -> dict[str, Any]:
        if stop.requested:  # whoever is at work ends after the step being taken
            for actor in [self.learner, *(c.handle for c in self.collectors)]:
                actor.interrupt.remote()
        self._settle(collects=True)
        self.save()
        self._picture()
        finished = self.run.finished and self._final_evaluation(stop)
        evaluation = self.run.recorder.last_evaluation if finished else None
        return self.run.recorder.summarise("completed" if finished else "interrupted", self.spec.device, evaluation)

    def _final_evaluation(self, stop: GracefulStop) -> bool:
        """With the newest weights; False if it was interrupted."""
        self.publish()
        self.evaluation_due = self.run.limiter.env_steps
        while self.evaluation_due is not None or self.evaluating is not None:
            if stop.requested:
                return False
            self.expect_somebody()
            self.dispatch_evaluation()
            self.take_ready(timeout=1.0)
        return True


def train(
    config: RunConfig, run_dir: Path, resume: bool = False, on_start: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """A whole run on Ray. Returns what summary.json holds; whatever happens, no actor is left behind.

    on_start: called once everything is up, and restored if `resume`, before the first step.
    """
    from distributed.lockstep import Lockstep

    coordinator = Lockstep(config, run_dir) if config.runtime.sync else Coordinator(config, run_dir)
    try:
        coordinator.start(resume)
        on_start()
        return coordinator.train()
    finally:
        coordinator.close()
