"""Starting the named actors of a run, and reading their results."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import (
    ActorAlreadyExistsError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)

from distributed.actors.member import GangBroken
from worldloom.acting.rollout import ActingLost

START_SECONDS = 180.0  # for an actor to come up
NAMED_SECONDS = 10.0  # of waiting, after which the user is shown what is waited for
ANSWER_SECONDS = 5.0  # for an actor to say that it is alive
DEATHS = (RayActorError, NodeDiedError, OutOfMemoryError)  # the last: by Ray's memory monitor
FAILURES = (RayTaskError, ObjectLostError, *DEATHS)


class ActorLost(RuntimeError):
    """The learner, replay or the acting server died; the coordinator starts it again."""


class ExchangeLost(ActorLost):
    """Says that a living learner could not exchange with the others; another's error may tell why."""


class WorkLost(ActorLost):
    """Says that what an actor was to work on went with another; it lives, and did nothing."""


class Launcher:
    """Starts actors under names in the run's namespace. They end with the driver, and never restart by themselves."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.between: Callable[[], None] = lambda: None  # called about once a second in every wait
        self.say: Callable[[str], None] = print

    def start(
        self,
        kind: type[Any],
        name: str,
        *args: Any,
        cpus: float = 0.0,
        gpus: float = 0.0,
        threads: dict[str, int] | None = None,
        where: Any = "DEFAULT",
        any_order: bool = False,
    ) -> Any:
        """Start an actor.

        threads: of each concurrency group that the actor's methods name. where: a Ray scheduling strategy. any_order:
        a call whose arguments are not there yet does not hold up later ones.
        """
        options = {"name": name, "namespace": self.namespace, "num_cpus": cpus, "num_gpus": gpus}
        options["allow_out_of_order_execution"] = any_order
        if where != "DEFAULT" and not cpus and not gpus:
            options["memory"] = 1  # byte: Ray places actors that need nothing at all at random, wherever they are to go
        actor = ray.remote(concurrency_groups=threads or {})(kind)  # type: ignore[call-overload]
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return actor.options(**options, scheduling_strategy=where, max_restarts=0, max_task_retries=0).remote(
                    *args
                )
            except ActorAlreadyExistsError:  # it was just killed, and its name is not free yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    @staticmethod
    def end(handle: Any) -> None:
        """Kill an actor; this also frees the name of one that has died."""
        ray.kill(handle)

    def wait(self, reference: Any, who: str) -> Any:
        """Return a result. Raises what the actor raised, ActorLost, or RuntimeError if it does not come up in time."""
        if not self._ready(reference, START_SECONDS, who):
            raise RuntimeError(
                f"{who} did not start within {START_SECONDS:.0f} s: the cluster has {ray.available_resources()} free. "
                "Free resources, or lower runtime.env_actors."
            )
        return result_of(reference, who)

    def result(self, reference: Any, who: str) -> Any:
        """Return a result, however long it takes. Raises what the actor raised, or ActorLost."""
        self.until_ready(reference, who)
        return result_of(reference, who)

    def until_ready(self, reference: Any, who: str) -> None:
        """Wait until a reference is ready, be it with a result or with an error."""
        self._ready(reference, float("inf"), who)

    def _ready(self, reference: Any, seconds: float, who: str) -> bool:
        """Wait until a reference is ready, for `seconds` at most."""
        return bool(self.first([reference], who, seconds))

    def first(self, references: Sequence[Any], who: str, seconds: float = float("inf")) -> list[Any]:
        """Wait until one of these references is ready, for `seconds` at most; return those that are."""
        begun, said = time.monotonic(), False
        while not (ready := ray.wait(list(references), timeout=1.0)[0]):
            waited = time.monotonic() - begun
            if waited > seconds:
                return []
            if waited > NAMED_SECONDS and not said:
                said = True
                self.say(f"waiting for {who} ({waited:.0f} s so far)")
            self.between()
        return list(ready)

    def all(self, references: Sequence[Any], names: Sequence[str], seconds: float = float("inf")) -> list[Any]:
        """Return the results of actors that need one another. Raises the first error of any, without waiting for the
        others, and ActorLost after `seconds`."""
        left, begun = list(references), time.monotonic()
        while left:
            who = ", ".join(names[references.index(reference)] for reference in left)
            ready = self.first(left, who, begun + seconds - time.monotonic())
            if not ready:
                raise ActorLost(f"{who}: no answer within {seconds:.0f} s.")
            for reference in ready:
                left.remove(reference)
                result_of(reference, names[references.index(reference)])
        return [ray.get(reference) for reference in references]


def result_of(reference: Any, who: str) -> Any:
    """Return a result that is ready. Raises what the actor raised, or ActorLost if it died."""
    try:
        return ray.get(reference)
    except FAILURES as error:
        raise reason(error, who) from error


def reason(error: Exception, who: str) -> Exception:
    """Return what really happened: an actor's own exception, or ActorLost.

    A task that could not get something from a dead actor raises what is both a RayTaskError and a death.
    """
    cause: Exception = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, GangBroken):
        return ExchangeLost(f"{cause}.")
    if isinstance(cause, (ObjectLostError, ActingLost, *DEATHS)):
        if cause is not error or isinstance(cause, ObjectLostError):
            return WorkLost(f"{who}: what it was to work on was lost ({type(cause).__name__}).")
        return ActorLost(f"{who}: died ({type(cause).__name__}).")
    return cause


def alive(handle: Any) -> bool:
    """Return whether the actor has not died; one that is silent has not. It has a method `pid`."""
    try:
        ray.get(handle.pid.remote(), timeout=ANSWER_SECONDS)
        return True
    except GetTimeoutError:
        return True
    except DEATHS:
        return False
