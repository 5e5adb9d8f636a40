"""The facts that all parts of a run share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distributed.cluster import Shares
from distributed.launcher import Launcher
from distributed.watching import Watch
from worldloom.runs.build import AgentSpec, EnvSpec
from worldloom.runs.config import RunConfig
from worldloom.runs.run import Run


@dataclass(frozen=True)
class Limits:
    """Bounds on how far the parts of a run go on without one another."""

    updates_in_flight: int  # tasks at the learner
    updates_per_task: int
    chunk_steps: int  # vector steps of one collect, at least
    chunks_per_second: float = float("inf")  # at most; where more came, collects become longer


@dataclass
class State:
    """The run, its newest weights, and the server that acts for env actors."""

    config: RunConfig
    env: EnvSpec
    launcher: Launcher
    limits: Limits
    shares: Shares = field(init=False)  # once the cluster was asked
    spec: AgentSpec = field(init=False)  # once the learner is up
    run: Run = field(init=False)  # once learner and replay are restored
    weights: Any = None  # a reference to the newest Weights, which the coordinator owns
    version: int = 0  # of those weights
    incarnation: int = 0  # of the env actor that was started last
    server: Any = None  # acts for env actors that hold no weights
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = Watch(self.config.runtime, self.launcher, self.say)
        self.launcher.between, self.launcher.say = self.watch.look, self.say

    def say(self, text: str) -> None:
        """Show a line to the user."""
        if hasattr(self, "run"):
            self.run.recorder.say(text)
        else:
            print(text, flush=True)

    @property
    def own_server(self) -> bool:
        """True if the acting server is an actor of its own, and not part of the learner."""
        return self.server is not None and self.config.runtime.acting_server == "actor"
