"""Evaluations as the coordinator sees them: one falls due, an env actor plays it, its result is recorded."""

from __future__ import annotations

from typing import Any

from distributed.actors.env import EnvActor
from distributed.collector import Collector
from distributed.launcher import ActorLost
from distributed.state import State
from worldloom.acting.evaluation import Evaluation
from worldloom.acting.rollout import ActingLost
from worldloom.interrupt import GracefulStop
from worldloom.runs.build import EVAL_SEED


class Evaluating:
    """Has evaluations played with the weights of the time at which they begin, one at a time."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.stop = GracefulStop()  # of the run: once it is requested, no evaluation is played on in this process
        self.due: int | None = None  # environment steps at which one fell due
        self.under_way: int | None = None  # environment steps that the current one belongs to

    @property
    def pending(self) -> bool:
        return self.due is not None or self.under_way is not None

    def begin(self, collector: Collector | None, own: EnvActor | None) -> None:
        """Begin the evaluation that is due, in an idle env actor, or in this process with `own`."""
        if self.due is None or self.under_way is not None:
            return
        if own is not None:
            if (evaluation := self._play(own)) is not None:
                self._state.run.recorder.evaluated(self.due, evaluation)
                self.due = None
        elif collector is not None:
            collector.evaluate(self._state, self.set_aside())
            self.under_way, self.due = self.due, None

    def _play(self, own: EnvActor) -> Evaluation | None:
        """Play an evaluation in this process; return None if Ctrl-C came before its end. Raises ActorLost."""
        evaluation, weights = None, self._state.launcher.result(self.set_aside(), "learner")
        try:
            while evaluation is None and not self.stop.requested:
                evaluation = own.evaluate(weights, self._state.server)
                weights = None  # the first call begins, the others go on
            return evaluation
        except ActingLost as error:
            raise ActorLost(str(error)) from error

    def set_aside(self) -> Any:
        """A reference to the newest weights, or to their version once the acting server keeps them for this."""
        if self._state.server is None:
            return self._state.weights
        return self._state.server.begin_evaluation.remote(self._state.weights, EVAL_SEED)

    def again(self) -> None:
        """Have the current evaluation played again, since it was lost."""
        self.due, self.under_way = self.under_way, None

    def finished(self, evaluation: Evaluation) -> None:
        env_steps, self.under_way = self.under_way, None
        self._state.run.recorder.evaluated(env_steps or 0, evaluation)
