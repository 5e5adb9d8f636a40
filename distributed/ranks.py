"""The learner actors of a run: one alone, or several ranks of a gang that make every update together."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distributed.acting import batching
from distributed.actors.learner import LearnerActor
from distributed.actors.member import About, Receipt, Seat
from distributed.launcher import START_SECONDS, ActorLost, alive
from distributed.ray_internals import free_cpus_by_node
from distributed.state import State
from distributed.watching import PREPARE_SECONDS
from worldloom.runs.build import AgentSpec
from worldloom.runs.learners import check_share, divisors

PLACE_SECONDS = 30.0  # for several learners to find a place, before fewer of them are tried
# The watch waits so much longer for one of several learners than an exchange lasts: those that wait for one that hangs
# fail before it is ended, and so tell which one that is.
NAMING_SECONDS = 15.0


class Ranks:
    """Starts learners, joins them, and ends them all when one of them is lost.

    broken: they can make no further update together, though some may live.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self.handles: list[Any] = []
        self.nodes: list[str] = []  # their ids
        self.broken = False
        self.backend = ""  # by which several exchange gradients
        self._group: Any = None  # Ray's placement group of several

    @property
    def size(self) -> int:
        return len(self.handles)

    @property
    def names(self) -> list[str]:
        return ["learner"][: self.size] if self.size <= 1 else [f"learner/{rank}" for rank in range(self.size)]

    def lost(self) -> bool:
        """Return whether one of them died, or broke off."""
        return self.broken or not all(alive(handle) for handle in self.handles)

    def start(self) -> AgentSpec:
        """Start as many as the configuration says and wait until they have built their agents; after a loss, as many
        as the cluster has room for."""
        wanted = self._state.config.runtime.learners
        again, self.broken = bool(self.handles), True  # until all of it is done
        if wanted == 1:
            spec = self._start_alone(self._state.shares.cpus)
        elif size := self._find_place(wanted, again):
            spec = self._start_gang(size)
            check_share(wanted, spec.batch_size)
        else:
            spec = self._start_alone(self._cpus_that_are_left())
        seconds = self._state.config.runtime.learner_timeout + (NAMING_SECONDS if self.size > 1 else 0.0)
        for name, handle in zip(self.names, self.handles, strict=True):
            self._state.watch.follow(name, handle, seconds)
        self.broken = False
        return spec

    def end(self) -> None:
        """End all of them, and watch them no more."""
        for name, handle in zip(self.names, self.handles, strict=True):
            self._state.watch.forget(name)
            self._state.launcher.end(handle)
        self._free_place()

    # Places

    def _find_place(self, wanted: int, again: bool) -> int:
        """Reserve a place for all learners or, after a loss, for as many as leave room for all other processes of the
        run; return for how many, 0 where that is not even two.

        Raises RuntimeError where the first start of a run finds no place for all of them.
        """
        if not again:
            if self._reserve(wanted, START_SECONDS):
                return wanted
            raise RuntimeError(
                f"the cluster has no room for {wanted} learners (runtime.learners) of {self._needs()} each: "
                f"{ray.available_resources()} are free. Lower runtime.learners, or free resources."
            )
        most = min(wanted, self._room())
        fitting = [size for size in divisors(self._state.spec.batch_size) if 1 < size <= most]
        return next((size for size in reversed(fitting) if self._reserve(size, PLACE_SECONDS)), 0)

    def _room(self) -> int:
        """Return how many learners the cluster's nodes have CPUs for besides all env actors and an acting server: those
        that live hold theirs, and the others come again."""
        shares = self._state.shares
        nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
        return sum(int(cpus / shares.cpus + 1e-6) for cpus in nodes) - (shares.processes - shares.learners)

    def _cpus_that_are_left(self) -> float:
        """Return the CPUs, in hundredths, that one learner alone can ask for after a loss: those of its share that are
        free now, and none where the other processes need them all."""
        if self._room() < 1:
            return 0.0
        free = max(free_cpus_by_node(), default=0.0)
        return min(self._state.shares.cpus, math.floor(100 * free + 1e-6) / 100)

    def _reserve(self, size: int, seconds: float) -> bool:
        """Reserve resources for so many: on one node if one is large enough, else on as few as possible.

        What no node has at all is not waited for; what is in use may come free, as that of an actor that has just died.
        """
        needs = self._needs()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = [min(int(node.get(name, 0.0) / each + 1e-6) for name, each in needs.items()) for node in nodes]
        if max(room) >= size and self._placed(size, "STRICT_PACK", PLACE_SECONDS if len(nodes) > 1 else seconds):
            return True
        return len(nodes) > 1 and sum(room) >= size and self._placed(size, "PACK", seconds)

    def _placed(self, size: int, strategy: str, seconds: float) -> bool:
        self._group, begun = placement_group([self._needs()] * size, strategy=strategy), time.monotonic()
        while not self._group.wait(1):
            if time.monotonic() - begun > seconds:
                self._free_place()
                return False
            self._state.launcher.between()
        return True

    def _free_place(self) -> None:
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def _needs(self) -> dict[str, float]:
        shares = self._state.shares
        return {name: each for name, each in (("CPU", shares.cpus), ("GPU", shares.gpus)) if each}

    # Starting

    def _launch(self, name: str, where: Any, cpus: float, any_order: bool) -> Any:
        threads = {"acting": batching(self._state.config).clients, "saving": 1, "control": 1}
        return self._state.launcher.start(
            *(LearnerActor, name, name),
            cpus=cpus,
            gpus=self._state.shares.gpus,
            threads=threads,
            where=where,
            any_order=any_order,
        )

    def _start_alone(self, cpus: float) -> AgentSpec:
        state = self._state
        # in any order, since the heartbeat must not wait for a batch that a frozen replay owes
        learner = self._launch("learner", "DEFAULT", cpus, any_order=True)
        self.handles = [learner]
        opened = learner.open.remote(state.config, state.env, state.shares.learner_threads, state.version)
        spec: AgentSpec = state.launcher.wait(opened, "the learner")
        self.nodes = [state.launcher.wait(learner.node.remote(), "the learner")]
        return spec

    def _start_gang(self, size: int) -> AgentSpec:
        state = self._state
        self.handles = []
        for rank in range(size):  # in order, so that all make the same updates
            where = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
            self.handles.append(self._launch(f"learner/{rank}", where, state.shares.cpus, any_order=False))
        with self._all_or_none():
            about: list[About] = self._ask("about")
            self.nodes = [each.node for each in about]
            check_versions(about)
            own_gpus = state.shares.gpus >= 1 and all(each.cuda for each in about)
            self.backend = "nccl" if own_gpus else "gloo"
            host, port = state.launcher.wait(self.handles[0].host.remote(), self.names[0])
            seconds, compiles = state.config.runtime.learner_timeout, state.config.train.compile
            if compiles == "auto":
                compiles = any(each.cuda for each in about)
            first = PREPARE_SECONDS if compiles else seconds
            seats = [Seat(rank, size, host, port, self.backend, seconds, first) for rank in range(size)]
            joined = [handle.join.remote(seat) for handle, seat in zip(self.handles, seats, strict=True)]
            state.launcher.all(joined, self.names, START_SECONDS)
            spec: AgentSpec = self._ask("open", state.config, state.env, state.shares.learner_threads, state.version)[0]
            self.compare()
        return spec

    @contextlib.contextmanager
    def _all_or_none(self) -> Iterator[None]:
        with contextlib.ExitStack() as undone:
            undone.callback(self.end)
            yield
            undone.pop_all()

    def _ask(self, method: str, *args: Any) -> list[Any]:
        asked = [getattr(handle, method).remote(*args) for handle in self.handles]
        return self._state.launcher.all(asked, self.names, START_SECONDS)

    # Working together

    def load(self, checkpoint: Path) -> int:
        """Restore the agents; return the number of updates that they have made."""
        self.broken = self.size > 1  # until all of it is done
        loading = [handle.load.remote(checkpoint) for handle in self.handles]
        updates: int = self._state.launcher.all(loading, self.names)[0]
        self.compare()
        self.broken = False
        return updates

    def publish(self) -> Any:
        """Return a reference to rank 0's weights, under a new version that all count. Raises ActorLost."""
        published = [handle.publish.remote() for handle in self.handles]
        self._state.launcher.all(published[1:], self.names[1:])
        return published[0]

    def update(self, shares: list[Any]) -> list[list[Any]]:
        """Have each learn from its share, a reference; return three references for each, see `LearnerActor.update`."""
        if self.size == 1:
            return [self.handles[0].update.options(num_returns=3).remote(shares[0])]
        ranks = zip(self.handles, shares, strict=True)
        return [handle.update_share.options(num_returns=3).remote([share]) for handle, share in ranks]

    def picture(self, sequence: Any, title: str) -> Any:
        """Have the first draw what its model imagines of a sequence, a reference; return a reference to the picture."""
        if self.size == 1:
            return self.handles[0].picture.remote(sequence, title)
        return self.handles[0].picture_of.remote([sequence], title)

    def interrupt(self) -> None:
        """Have one alone end its task after the update that it makes; several finish theirs, which are short, since
        they would end after different ones."""
        if self.size == 1:
            self.handles[0].interrupt.remote()

    def compare(self) -> None:
        """Raise RuntimeError unless the parameters of all are equal, bit for bit."""
        if self.size > 1 and (other := different(self.names, self._ask("receipt"))):
            raise RuntimeError(
                f"{other} has other parameters than learner/0 at the start. All nodes of learners need the same "
                "versions, and the same files of the run."
            )

    def agree(self, receipts: Sequence[Receipt | None]) -> None:
        """Raise ActorLost, all of them being broken, unless their receipts of the same moment are equal."""
        if other := different(self.names, receipts):
            self.broken = True
            theirs = receipts[self.names.index(other)]
            raise ActorLost(
                f"{other} differs from learner/0 after the same updates: {theirs} against {receipts[0]}. All "
                "learners need the same kind of processor or GPU and the same versions."
            )


def different(names: Sequence[str], receipts: Sequence[Receipt | None]) -> str | None:
    """Return the name of the first learner whose receipt is not rank 0's, None if all agree."""
    return next((name for name, each in zip(names, receipts, strict=False) if each != receipts[0]), None)


def check_versions(about: Sequence[About]) -> None:
    """Raise RuntimeError unless all learners have one version of torch."""
    if len({each.torch for each in about}) > 1:
        found = ", ".join(f"{each.torch} on node {each.node[:8]}" for each in about)
        raise RuntimeError(
            f"the learners have different versions of torch ({found}), which do not compute the same numbers. "
            "Install one version on all nodes."
        )
