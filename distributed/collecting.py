"""The env actors as the coordinator sees them: collects and inserts under way, deaths, restarts."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection
from typing import Any

import ray
import torch
from ray.exceptions import ObjectLostError, RayTaskError

from distributed.actors.env import EnvActor
from distributed.collector import BUILD, EVALUATION, Collector
from distributed.evaluating import Evaluating
from distributed.inserting import Inserting
from distributed.launcher import DEATHS, START_SECONDS, reason
from distributed.state import State
from worldloom.envs import EnvironmentFailed

RESTARTS_ALLOWED = 5  # of one env actor in a row, without a chunk in between
HANGS_ALLOWED = 10  # of one env actor within HANG_WINDOW times runtime.collect_timeout
HANG_WINDOW = 30
SILENT_SECONDS = 10.0  # beyond runtime.chunk_seconds, after which an env actor is named on screen
LOOK_SECONDS = 1.0  # between two looks at who is silent


class Collecting:
    """Keeps env actors collecting, hands their chunks to replay, and replaces those that die or hang.

    Without env actors this process collects by itself, with `own`.
    """

    def __init__(self, state: State, inserting: Inserting, evaluating: Evaluating) -> None:
        self._state, self._inserting, self._evaluating = state, inserting, evaluating
        self.collectors: list[Collector] = []
        self.own: EnvActor | None = None
        self._hangs: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=HANGS_ALLOWED))  # when, by actor
        self._looked = 0.0
        self._held_since: float | None = None
        self._somebody_at = 0.0  # when an env actor was last known to be up

    # Starting

    def start(self) -> None:
        state = self._state
        self._somebody_at = time.monotonic()
        actors = state.config.runtime.env_actors
        self.collectors = [self._start(index) for index in range(actors)]
        if not actors:
            torch.set_num_threads(1)
            self.own = EnvActor(state.config, state.spec, 0, state.incarnation, state.server is not None)
        where = f"{actors} env actors" if actors else "the coordinator itself"
        server = "acting server" if state.own_server else "learner"
        acting = "" if state.server is None else f", acted for by the {server}"
        state.run.recorder.say(
            f"collecting: {where} x {state.config.env.num_envs} environments{acting}; learner: "
            f"{state.shares.learner_threads} threads"
        )

    def _start(self, index: int) -> Collector:
        """Start an env actor in the newest incarnation."""
        state = self._state
        made = Collector(index, state.incarnation, None, None)
        arguments = (state.config, state.spec, index, state.incarnation, state.server is not None)
        made.handle = state.launcher.start(
            EnvActor, made.name, *arguments, cpus=state.shares.cpus, threads={"control": 1}, where="SPREAD"
        )
        made.coming = made.handle.node.remote()
        return made

    # Asking

    def dispatch(self) -> None:
        """Give work to idle env actors, unless collecting is too far ahead of learning."""
        self.begin_evaluation()
        self.expect_somebody()
        held = False
        for collector in [c for c in self.collectors if c.idle]:
            steps = self.steps_to_collect()
            held = held or (steps > 0 and self._too_far_ahead())
            if steps == 0 or held:
                break
            collector.collect(self._state, steps)
        self._count_held_time(held)

    def begin_evaluation(self) -> None:
        self._evaluating.begin(next((c for c in self.collectors if c.idle), None), self.own)

    def expect_somebody(self) -> None:
        """Raises RuntimeError if no env actor comes up in time; the run goes on with those that do."""
        now = time.monotonic()
        if not self.collectors or any(c.node for c in self.collectors):
            self._somebody_at = now
        elif now - self._somebody_at > START_SECONDS:
            raise RuntimeError(
                f"no env actor came up within {START_SECONDS:.0f} s; each asks for {self._state.shares.cpus:g} CPUs. "
                f"The cluster has {ray.available_resources()} free. Free resources, or lower runtime.env_actors."
            )

    def steps_to_collect(self) -> int:
        """Vector steps for the next collect, 0 once total_steps are collected or under way."""
        config, under_way = self._state.config, self.requested() + self._inserting.steps
        left = config.train.total_steps - self._state.run.limiter.env_steps - under_way
        return max(min(self._state.limits.chunk_steps, math.ceil(left / config.env.num_envs)), 0)

    def requested(self) -> int:
        """Environment steps that env actors have been asked for."""
        return sum(c.requested for c in self.collectors)

    def _too_far_ahead(self) -> bool:
        """Return whether collecting leads by more than one round of chunks and what the next update takes."""
        actors, envs = max(len(self.collectors), 1), self._state.config.env.num_envs
        limiter = self._state.run.limiter
        round_of_chunks = self._state.limits.chunk_steps * envs * actors
        return limiter.steps_ahead() > round_of_chunks + 1 / limiter.updates_per_step

    def collect_here(self) -> bool:
        """Collect in this process, between two looks at the learner; return whether there was something to do."""
        assert self.own is not None
        steps = self.steps_to_collect()
        held = steps > 0 and self._too_far_ahead()
        self._count_held_time(held)
        if steps == 0 or held:
            return False
        state = self._state
        weights = state.launcher.result(state.weights, "learner") if state.server is None else None
        chunk, info = self.own.collect(steps, state.run.random_actions, weights, state.server)
        self._inserting.begin(chunk, info)
        return True

    def _count_held_time(self, held: bool) -> None:
        now = time.monotonic()
        if self._held_since is not None:
            self._state.run.recorder.held(now - self._held_since)
        self._held_since = now if held else None

    # Taking in

    def pending(self) -> list[Any]:
        tasks = [c.task for c in self.collectors if c.task is not None]
        return [*tasks, *(c.coming for c in self.collectors if c.node is None)]

    def take(self, ready: Collection[Any]) -> None:
        """Take in what env actors are done with, and replace those that hang. Raises ActorLost."""
        for collector in list(self.collectors):
            if collector.node is None and collector.coming in ready:
                self._take_up(collector)
            elif collector.task in ready:
                self.take_result(collector)
        self._look_for_silence()

    def _look_for_silence(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked, runtime = now, self._state.config.runtime
        for collector in [c for c in self.collectors if c.task is not None]:
            silence, patience = now - collector.since, collector.patience(self._state)
            if silence > patience:
                self.replace_silent(collector)
            elif silence > SILENT_SECONDS + runtime.chunk_seconds and not collector.named:
                collector.named = True
                doing = {BUILD: "building an environment", EVALUATION: "evaluating"}.get(collector.chunk, "collecting")
                self._state.say(
                    f"{collector.name} has been {doing} for {silence:.0f} s without an answer; it is replaced after "
                    f"{patience:g} s"
                )

    def _take_up(self, collector: Collector) -> None:
        """Note the place that it found in the cluster; work waits for that, so that no step is promised in vain."""
        try:
            collector.node = ray.get(collector.coming)
        except DEATHS as error:
            self.replace(collector, f"did not come up ({type(error).__name__})", error)
        else:
            collector.build()

    def take_result(self, collector: Collector) -> None:
        """Take in what its task returned. Raises ActorLost, or what the environment raised."""
        chunk = collector.chunk
        try:
            result = ray.get(collector.task)
        except (RayTaskError, ObjectLostError) as error:  # before deaths: of what it asked another for, it is both
            if chunk is EVALUATION:
                self._evaluating.again()
            elif not isinstance(chunk, str):
                ray.wait([chunk])  # it carries the same error, which would be reported as unread
            collector.drop_task()
            raise reason(error, collector.name) from error
        except DEATHS as error:
            self.replace(collector, f"died ({type(error).__name__})", error)
            return
        if chunk is EVALUATION and result is None:  # episodes are left to play
            collector.go_on_evaluating()
        elif chunk is BUILD and result is None:  # environments are left to build
            collector.build()
        else:
            collector.drop_task()
            self._take_whole(collector, chunk, result)

    def _take_whole(self, collector: Collector, chunk: Any, result: Any) -> None:
        """Take in a task that is complete."""
        if chunk is BUILD:
            collector.built = True
            if sum(result) > SILENT_SECONDS:
                each = ", ".join(f"{seconds:.1f}" for seconds in result)
                self._state.say(f"{collector.name} built {len(result)} environments, which took {each} s")
        elif chunk is EVALUATION:
            collector.restarts = 0
            self._evaluating.finished(result)
        elif not isinstance(chunk, str):
            collector.restarts = 0
            self._inserting.begin(chunk, result)

    # Losing

    def replace_silent(self, collector: Collector) -> None:
        patience, hangs = collector.patience(self._state), self._hangs[collector.index]
        hangs.append(time.monotonic())
        window = HANG_WINDOW * self._state.config.runtime.collect_timeout
        if len(hangs) == HANGS_ALLOWED and hangs[-1] - hangs[0] < window:
            raise EnvironmentFailed(
                f"{collector.name} gave no answer {HANGS_ALLOWED} times within {window:.0f} s, each time for "
                f"{patience:g} s. Look for an environment that hangs, then go on with --resume."
            )
        self.replace(collector, f"gave no answer for {patience:g} s")

    def replace(self, collector: Collector, why: str, error: Exception | None = None) -> None:
        """Start a lost env actor again; it gets the newest weights before it acts. Raises RuntimeError if it was lost
        again and again."""
        if collector.restarts >= RESTARTS_ALLOWED:
            raise EnvironmentFailed(
                f"{collector.name} was lost {RESTARTS_ALLOWED + 1} times in a row without finishing a collect; the "
                f"last time it {why}. Look for an environment that kills or blocks its process."
            ) from error
        recorder = self._state.run.recorder
        recorder.counters["actor_restarts"] += 1
        self._discard(collector.requested)
        recorder.say(f"{collector.name} {why}; started again, at most {collector.requested} steps discarded")
        self._start_again(collector, collector.restarts + 1)

    def move(self, collector: Collector) -> None:
        """Start an env actor again on a node that stays."""
        self._state.run.recorder.say(f"{collector.name} leaves a node that is about to go")
        self._start_again(collector, 0)

    def _start_again(self, collector: Collector, restarts: int) -> None:
        self._state.launcher.end(collector.handle)
        if collector.evaluating:
            self._evaluating.again()
        self._state.incarnation += 1
        fresh = self._start(collector.index)
        fresh.restarts = restarts
        self.collectors[collector.index] = fresh

    def restart_episodes(self, feeds: Callable[[int], bool] = lambda index: True) -> None:
        """Start new episodes in env actors that live on, those whose index `feeds` accepts."""
        self._state.incarnation += 1
        if self.own is not None:
            self.own.restart(self._state.incarnation)
        for collector in self.collectors.copy():
            if feeds(collector.index):  # what it is doing ends before the restart, and is not taken in
                if collector.evaluating:
                    self._evaluating.again()
                self._discard(collector.drop_task())
                if collector.built:
                    collector.restart(self._state.incarnation)
                else:  # it knows only the incarnation that it was started with
                    self._start_again(collector, collector.restarts)

    def _discard(self, env_steps: int) -> None:
        self._state.run.recorder.counters["env_steps_discarded"] += env_steps
