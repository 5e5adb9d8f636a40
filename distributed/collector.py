"""A remote env actor as the coordinator sees it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from distributed.state import State

BUILD, EVALUATION, RESTART = "build", "evaluation", "restart"  # tasks that give no chunk


@dataclass
class Collector:
    """One remote env actor and what it is doing."""

    index: int
    incarnation: int
    handle: Any
    coming: Any  # reference to the id of its node, ready once the actor is up
    node: str | None = None  # once it is up
    version: int = -1  # of the weights that it holds
    task: Any = None  # reference to the info of the current collect, or to the current evaluation
    chunk: Any = None  # reference to the chunk, or which other task it is
    requested: int = 0  # environment steps
    since: float = 0.0
    restarts: int = 0
    built: bool = False  # its environments are
    named: bool = False  # on screen, in this silence
    leaving: bool = False  # its node is about to go: it is moved once its chunk is here

    @property
    def name(self) -> str:
        return f"env/{self.index:03d}"

    @property
    def idle(self) -> bool:
        """True if its environments are built, it has no task, and is to stay."""
        return self.task is None and self.built and not self.leaving

    @property
    def evaluating(self) -> bool:
        return self.task is not None and self.chunk is EVALUATION

    @property
    def collecting(self) -> bool:
        return self.task is not None and not isinstance(self.chunk, str)

    def build(self) -> None:
        """Ask for its next environment to be built."""
        self._begin(BUILD, self.handle.build.remote())

    def restart(self, incarnation: int) -> None:
        """Ask for new episodes in all its environments."""
        self.incarnation = incarnation
        self._begin(RESTART, self.handle.restart.remote(incarnation))

    def _begin(self, kind: Any, task: Any) -> None:
        self.chunk, self.task, self.since, self.named = kind, task, time.monotonic(), False

    def collect(self, state: State, steps: int) -> None:
        """Ask for a chunk of so many vector steps, with the newest weights."""
        fresh = state.server is not None or self.version == state.version
        collect = self.handle.collect.options(num_returns=2, name=f"{self.name}.collect")
        weights = None if fresh else state.weights
        self._begin(*collect.remote(steps, state.run.random_actions, weights, state.server))
        if state.server is None:
            self.version = state.version
        self.requested = steps * state.config.env.num_envs

    def evaluate(self, state: State, start: Any) -> None:
        """Ask for an evaluation; see `EnvActor.evaluate` for `start`, of which this is a reference."""
        self._begin(EVALUATION, self.handle.evaluate.remote(start, state.server))
        if state.server is None:
            self.version = state.version

    def go_on_evaluating(self) -> None:
        self._begin(EVALUATION, self.handle.evaluate.remote(None))

    def patience(self, state: State) -> float:
        """Seconds that its task may take."""
        runtime = state.config.runtime
        if self.chunk is BUILD:
            return runtime.build_timeout
        if self.chunk is EVALUATION:  # which builds environments too, one in a call
            return max(runtime.build_timeout, runtime.collect_timeout)
        return runtime.collect_timeout

    def drop_task(self) -> int:
        """Forget what it is doing; return the environment steps that were asked for."""
        requested, self.requested = self.requested, 0
        self.task = self.chunk = None
        return requested
