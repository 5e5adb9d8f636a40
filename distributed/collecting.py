"""The env actors as the coordinator sees them: collects and inserts under way, deaths, restarts."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection
from typing import Any

import ray
import torch
from ray.exceptions import ObjectLostError, RayTaskError

from distributed.actors.env import EnvActor
from distributed.budget import Budget
from distributed.collector import BUILD, EVALUATION, RESTART, Collector
from distributed.evaluating import Evaluating
from distributed.inserting import Inserting
from distributed.launcher import DEATHS, START_SECONDS, reason
from distributed.state import State
from worldloom.envs import EnvironmentFailed

RESTARTS_ALLOWED = 5  # of one env actor in a row, without a chunk in between
HANGS_ALLOWED = 10  # of one env actor within HANG_WINDOW times runtime.collect_timeout
HANG_WINDOW = 30
SILENT_SECONDS = 10.0  # beyond runtime.collect_seconds, after which an env actor is named on screen
LOOK_SECONDS = 1.0  # between two looks at who is silent


class Collecting:
    """Keeps env actors collecting, hands their chunks to replay, and replaces those that die or hang.

    Without env actors this process collects by itself, with `own`.
    """

    def __init__(self, state: State, inserting: Inserting, evaluating: Evaluating) -> None:
        self._state, self._inserting, self._evaluating = state, inserting, evaluating
        self.collectors: list[Collector] = []
        self._tasks: dict[Any, Collector] = {}  # by reference to what is waited for
        self._idle: dict[int, Collector] = {}  # by index
        self.budget = Budget(state, inserting)
        self.own: EnvActor | None = None
        self._hangs: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=HANGS_ALLOWED))  # when, by actor
        self._looked = 0.0
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

    def _start(self, index: int, again: bool = False) -> Collector:
        """Start an env actor in the newest incarnation.

        again: under a new name, because Ray gives the name of a frozen actor free only 5 s after its end, and nobody is
        to wait for that.
        """
        state = self._state
        made = Collector(index, state.incarnation, None, None)
        name = f"{made.name}-{state.incarnation}" if again else made.name
        arguments = (state.config, state.spec, index, state.incarnation, state.server is not None)
        made.handle = state.launcher.start(
            EnvActor, name, *arguments, cpus=state.shares.cpus, threads={"control": 1}, where="SPREAD"
        )
        made.coming = made.handle.node.remote()
        self._tasks[made.coming] = made
        return made

    # Asking

    def dispatch(self) -> None:
        """Give work to idle env actors, unless collecting is too far ahead of learning."""
        self.begin_evaluation()
        self.expect_somebody()
        held = False
        for collector in list(self._idle.values()):
            if (steps := self.budget.steps()) == 0:
                break
            if self.budget.too_far_ahead():
                held = True
                break
            if not self._inserting.accepts(collector.index):
                held = True
            elif collector.idle:
                self.collect(collector, steps)
        self.budget.count_held_time(held)

    def collect(self, collector: Collector, steps: int) -> None:
        """Ask an idle env actor for a chunk of so many vector steps."""
        collector.collect(self._state, steps)
        self.budget.requested += collector.requested
        self._asked(collector)

    def _asked(self, collector: Collector) -> None:
        """Note that it has a new task."""
        self._idle.pop(collector.index, None)
        self._tasks[collector.task] = collector

    def _dropped(self, collector: Collector) -> int:
        """Have it forget its task; return the environment steps that were asked for."""
        self._tasks.pop(collector.task, None)
        steps = collector.drop_task()
        self.budget.requested -= steps
        return steps

    def begin_evaluation(self) -> None:
        """Begin the evaluation that is due, in an idle env actor or in this process."""
        idle = next((c for c in self._idle.values() if c.idle), None) if self._evaluating.due is not None else None
        self._evaluating.begin(idle, self.own)
        if idle is not None and idle.task is not None:
            self._asked(idle)

    def expect_somebody(self) -> None:
        """Raises RuntimeError if no env actor comes up in time; the run goes on with those that do."""
        now = time.monotonic()
        if not self.collectors or self._idle or any(c.node for c in self.collectors):
            self._somebody_at = now
        elif now - self._somebody_at > START_SECONDS:
            raise RuntimeError(
                f"no env actor came up within {START_SECONDS:.0f} s; each asks for {self._state.shares.cpus:g} CPUs. "
                f"The cluster has {ray.available_resources()} free. Free resources, or lower runtime.env_actors."
            )

    def collect_here(self) -> bool:
        """Collect in this process, between two looks at the learner; return whether there was something to do."""
        assert self.own is not None
        steps = self.budget.steps()
        held = steps > 0 and (self.budget.too_far_ahead() or not self._inserting.accepts(0))
        self.budget.count_held_time(held)
        if steps == 0 or held:
            return False
        state = self._state
        weights = state.launcher.result(state.weights, "learner") if state.server is None else None
        chunk, info = self.own.collect(steps, state.run.random_actions, weights, state.server)
        self._inserting.begin(chunk, info)
        return True

    # Taking in

    def pending(self) -> list[Any]:
        return list(self._tasks)

    def take(self, ready: Collection[Any]) -> None:
        """Take in what env actors are done with, and replace those that hang. Raises ActorLost."""
        for reference in ready:
            if (collector := self._tasks.get(reference)) is None:
                continue
            if collector.node is None and reference == collector.coming:
                del self._tasks[reference]
                self._take_up(collector)
            else:
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
            elif silence > SILENT_SECONDS + runtime.collect_seconds and not collector.named:
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
            self._asked(collector)

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
            self._dropped(collector)
            self.free(collector)
            raise reason(error, collector.name) from error
        except DEATHS as error:
            self.replace(collector, f"died ({type(error).__name__})", error)
            return
        self._tasks.pop(collector.task, None)
        if chunk is EVALUATION and result is None:  # episodes are left to play
            collector.go_on_evaluating()
            self._asked(collector)
        elif chunk is RESTART or (chunk is BUILD and result is None):  # environments are left to build
            collector.build()
            self._asked(collector)
        else:
            self._dropped(collector)
            try:
                self._take_whole(collector, chunk, result)
            finally:  # a chunk may tell of a lost server, and its actor goes on after the recovery
                self.free(collector)

    def free(self, collector: Collector) -> None:
        """Note that it has no task."""
        if collector.built and self.collectors[collector.index] is collector:
            self._idle[collector.index] = collector

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
            self.budget.size.count()
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
        """Start a lost env actor again; it gets the newest weights before it acts. Raises EnvironmentFailed if it was
        lost again and again."""
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
        for reference in (collector.task, collector.coming):
            self._tasks.pop(reference, None)
        self._idle.pop(collector.index, None)
        self.budget.requested -= collector.requested
        fresh = self._start(collector.index, again=True)
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
                self._discard(self._dropped(collector))
                if collector.built:
                    collector.built = False
                    collector.restart(self._state.incarnation)
                    self._asked(collector)
                else:  # it knows only the incarnation that it was started with
                    self._start_again(collector, collector.restarts)

    def forget_tasks(self) -> None:
        """Take in nothing that is under way."""
        for collector in self.collectors:
            self._dropped(collector)

    @property
    def busy(self) -> bool:
        """True while an env actor collects."""
        return any(collector.collecting for collector in self._tasks.values())

    def _discard(self, env_steps: int) -> None:
        self._state.run.recorder.counters["env_steps_discarded"] += env_steps
