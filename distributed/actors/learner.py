"""The learner actor: the agent on its device, in a process of its own."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from distributed.acting import Batching, make_server
from distributed.actors.member import About, GangBroken, Member, Receipt, Seat
from distributed.actors.pulse import Process, timed
from distributed.actors.replay import Batches, WrittenColumns
from worldloom.acting.rollout import Acted
from worldloom.acting.server import ActingServer, Client
from worldloom.replay.buffer import as_batch
from worldloom.report.pictures import Drawn, show_sequence
from worldloom.runs.agent_state import copy_agent, load_agent_state, rescue_agent, take_agent, write_agent
from worldloom.runs.build import AgentSpec, EnvSpec, agent_spec, choose_device, make_run_agent
from worldloom.runs.config import RunConfig
from worldloom.runs.learners import join
from worldloom.types import Array, Batch, FreshColumns, ObsArray, Weights

PREPARING = 3  # updates in which compilation and the recording of CUDA graphs happen


@dataclass(frozen=True)
class UpdateResult:
    """The counts of a task of several updates, for the coordinator."""

    metrics: dict[str, float]  # means over the updates
    updates: int
    seconds: float  # of learning
    publish_seconds: float
    published: int | None  # version of the weights published at the end, if any
    receipt: Receipt | None = None  # of a learner that is one of several


def _copy(batch: dict[str, Array]) -> Batch:
    """Copy out of the object store, whose memory is read-only and must not stay pinned."""
    return as_batch({name: torch.from_numpy(np.array(value)) for name, value in batch.items()})


class LearnerActor(Process):
    """Holds the Agent on its device and updates it from batches; on request it acts for env actors too."""

    def __init__(self, name: str = "learner") -> None:
        super().__init__()
        self.pulse_clock.preparing = True
        self._member = Member(name)

    def about(self) -> About:
        """See `Member.about`."""
        return self._member.about()

    def host(self) -> tuple[str, int]:
        """See `Member.host`; of rank 0 alone."""
        return self._member.host()

    def join(self, seat: Seat) -> None:
        """See `Member.join`; before `open`."""
        self._member.join(seat)

    def open(self, config: RunConfig, env: EnvSpec, threads: int, version: int) -> AgentSpec:
        """Build the agent, outside of the constructor as in ReplayActor; weights were published up to `version`."""
        torch.set_num_threads(threads)
        self._device, gang = choose_device(config.train.device), self._member.gang
        if gang.size > 1 and not self._member.captures:
            config = replace(config, train=replace(config.train, capture=False))
        self._agent = make_run_agent(config, env, self._device, config.train.seed)
        if gang.size > 1:
            join(self._agent, gang, config.algorithm)
        self._version, self._seed, self._train = version, config.train.seed, config.train
        self._publish_every, self._compare_every = config.runtime.publish_interval, config.runtime.receipt_interval
        self._server: ActingServer | None = None
        self._interrupted, self._learned = threading.Event(), 0  # updates in this process
        self.pulse_clock.preparing = config.train.compile is True or "cuda" in self._device
        return agent_spec(self._agent)

    def __repr__(self) -> str:
        return self._member.name

    def serve(self, batching: Batching, incarnation: int) -> None:
        """Start to act for env actors, with the published weights."""
        seed = self._seed + incarnation
        description, threads = self._agent.describe(), torch.get_num_threads()
        self._server = make_server(description, self._device, seed, batching, threads, self._train)

    @ray.method(concurrency_group="acting")
    def act(self, client: Client, obs: dict[str, Array], is_first: Array) -> Acted:
        return self._served().act(client, obs, is_first)

    @ray.method(concurrency_group="acting")
    def begin_evaluation(self, weights: Weights, seed: int) -> int:
        return self._served().begin_evaluation(weights, seed)

    @ray.method(concurrency_group="acting")
    def act_in_evaluation(self, obs: ObsArray, is_first: Array) -> Array:
        return self._served().act_in_evaluation(obs, is_first)

    def _served(self) -> ActingServer:
        if self._server is None:
            raise RuntimeError("this learner does not act for others: serve comes first.")
        return self._server

    @ray.method(concurrency_group="control")
    def serving_gauges(self) -> dict[str, float]:
        return {} if self._server is None else self._server.gauges()

    @timed
    def update(self, batches: Batches) -> tuple[UpdateResult, list[WrittenColumns], Weights | None]:
        """Learn from each batch in turn.

        Returns three separate objects: what the coordinator counts, columns for replay, and new weights where they
        are due.
        """
        begun, before = time.monotonic(), self._agent.updates
        fresh: list[tuple[Array, FreshColumns]] = []
        for batch in batches:
            if self._interrupted.is_set():
                break
            fresh.append((batch["rows"], self._agent.learn(_copy(batch))))
            self._learned += 1
            self.pulse_clock.preparing &= self._learned < PREPARING
            if self._learned == PREPARING:
                self._member.prepared()
            self.pulse_clock.progress()
        written = [(rows, columns) for rows, made in fresh if (columns := made.arrays())]
        means = self._agent.collect() if fresh else {}
        due = self._passed(self._publish_every, before)
        publishing = time.monotonic()
        weights = self.publish() if due else None
        publish_seconds = time.monotonic() - publishing if due else 0.0
        published = self._version if due else None
        receipt = self._member.receipt(self._agent, self._version, self._passed(self._compare_every, before))
        result = UpdateResult(means, len(fresh), publishing - begun, publish_seconds, published, receipt)
        return result, written, weights

    def _passed(self, interval: int, before: int) -> bool:
        """Return whether a multiple of `interval` updates was reached since there were `before`."""
        return bool(self._agent.updates // interval > before // interval)

    def update_share(self, share: list[Any]) -> tuple[UpdateResult, list[WrittenColumns], Weights | None]:
        """Make `update` together with the other learners. share: one reference to this learner's part of the batches.

        Ray gives all learners these calls in one order. A reference as an argument of its own could hold back the
        heartbeat, or let a later call go first. Raises GangBroken, or what replay's loss raises before anything is
        learned.
        """
        try:
            batches: Batches = ray.get(share[0], timeout=self._member.seconds)
        except ray.exceptions.GetTimeoutError as error:
            raise GangBroken(f"{self._member.name} got no batch for {self._member.seconds:.0f} s") from error
        try:
            return self.update(batches)
        except RuntimeError as error:
            if (broken := self._member.explain(error)) is None:
                raise
            raise broken from error

    def receipt(self) -> Receipt | None:
        """Return the state with its digest."""
        return self._member.receipt(self._agent, self._version, True)

    def publish(self) -> Weights | None:
        """Return the weights under a new version; of several learners only rank 0 does, and the others count."""
        self._version += 1
        if self._member.gang.rank:
            return None
        weights = Weights(self._version, self._agent.acting_weights())
        if self._server is not None:
            self._server.load(weights)
        return weights

    @ray.method(concurrency_group="control")
    def interrupt(self) -> None:
        """End the current task, and every later one, after the update that is being made."""
        self._interrupted.set()

    @timed
    def picture(self, sequence: dict[str, Array] | None, title: str) -> Drawn | None:
        return show_sequence(self._agent.world_model, sequence, title)

    def picture_of(self, sequence: list[Any], title: str) -> Drawn | None:
        """Draw `picture`; the sequence is a reference in a list, see `update_share`."""
        return self.picture(ray.get(sequence[0]), title)

    @timed
    def snapshot(self) -> float:
        """Copy what a checkpoint needs; return the seconds that this took."""
        begun = time.monotonic()
        self._snapshot = copy_agent(self._agent)
        return time.monotonic() - begun

    @ray.method(concurrency_group="saving")
    def write(self, folder: Path, taken: list[Any]) -> tuple[float, dict[str, str]]:
        """Write the snapshot while updates go on; return the seconds for which learning stood still, and checksums.

        taken: the reference that `snapshot` returned, in a list, see `update_share`.
        """
        seconds: float = ray.get(taken[0])
        try:
            return seconds, write_agent(folder, self._snapshot)
        finally:
            del self._snapshot

    @timed
    def rescue(self, run_dir: Path) -> Path | None:
        return rescue_agent(run_dir, take_agent(self._agent))

    @timed
    def load(self, folder: Path) -> int:
        """Restore a checkpoint; return the number of updates that the agent has made."""
        load_agent_state(folder, self._agent)
        return self._agent.updates
