"""The Ray actors. Each is a shell around one plain class; decisions stand in those classes and in the coordinator."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from distributed.acting import RemoteActing, RemoteJudge, Serving, lane_sizes, make_server
from worldloom.acting.evaluation import Evaluation, Evaluator
from worldloom.acting.local import LocalActing
from worldloom.acting.rollout import Acted, Lane, Rollout
from worldloom.acting.server import ActingServer, Client
from worldloom.families import agent_from_description
from worldloom.replay.buffer import Acceptance, as_batch
from worldloom.replay.chunk import Chunk, ChunkInfo
from worldloom.report.pictures import sequence_picture
from worldloom.runs.build import (
    AgentSpec,
    EnvSpec,
    actor_seed,
    agent_spec,
    choose_device,
    make_replay,
    make_run_agent,
    make_run_env,
    start_run_evaluation,
)
from worldloom.runs.checkpoint import ReplayStore, copy_agent, load_agent_state, write_agent
from worldloom.runs.config import RunConfig
from worldloom.types import Array, Batch, FreshColumns, ObsArray, Weights

RECENT_DRAWS = 1000

Batches = list[dict[str, Array]]
WrittenColumns = tuple[Array, dict[str, Array]]  # row numbers [B, T] and replay columns [B, T, ...]


@dataclass(frozen=True)
class UpdateResult:
    """What the coordinator counts of a task of several updates."""

    metrics: dict[str, float]  # means
    updates: int
    seconds: float  # of learning
    publish_seconds: float
    published: int | None  # version of the weights published at the end, if any


def _copy(batch: dict[str, Array]) -> Batch:
    """Out of the object store, whose memory is read-only and must not stay pinned."""
    return as_batch({name: torch.from_numpy(np.array(value)) for name, value in batch.items()})


class EnvActor:
    """Runs one Rollout, and evaluations, in a process of its own with one torch thread."""

    def __init__(self, config: RunConfig, spec: AgentSpec, index: int, incarnation: int, served: bool) -> None:
        self._config, self._spec, self._index, self._served = config, spec, index, served
        self._incarnation = incarnation
        self._rollout: Rollout | None = None  # made in the thread that steps it: a renderer belongs to its thread
        self._evaluator: Evaluator | None = None
        self._interrupted = threading.Event()

    def __repr__(self) -> str:
        return f"env/{self._index:03d}"

    @cached_property
    def _local(self) -> LocalActing:
        """A copy of the agent here, with one torch thread."""
        torch.set_num_threads(1)
        return LocalActing(agent_from_description(self._spec.description, seed=self._config.train.seed))

    def _new_rollout(self) -> Rollout:
        config, index, incarnation = self._config, self._index, self._incarnation
        lanes = []
        for number, size in enumerate(lane_sizes(config.env.num_envs, self._served)):
            env = make_run_env(config.env, size, actor_seed(config, index, incarnation, number))
            acting = self._local if not self._served else self._remote_acting(number)
            lanes.append(Lane(env, acting))
        return Rollout(lanes, config.train.seed, actor=index, incarnation=incarnation)

    def _remote_acting(self, lane: int) -> RemoteActing:
        client = Client(self._index, lane, self._incarnation, session=0)
        return RemoteActing(self._spec.columns, client, self._config.runtime.collect_timeout / 2)

    def restart(self, incarnation: int) -> None:
        """Begin all episodes anew; the open ones end where replay has them."""
        self.close()
        self._rollout, self._incarnation = None, incarnation

    def collect(self, steps: int, random: bool, weights: Weights | None, server: Any = None) -> tuple[Chunk, ChunkInfo]:
        """A chunk for replay, and separately what the coordinator must know of it."""
        if weights is not None:
            self._local.load(weights)
        self._rollout = self._rollout or self._new_rollout()
        for lane in self._rollout.lanes:
            if isinstance(lane.acting, RemoteActing):
                lane.acting.server = server
        chunk = self._rollout.collect(steps, random, self._config.runtime.chunk_seconds, self._interrupted.is_set)
        return chunk, chunk.info

    def evaluate(self, start: Weights | int | None, server: Any = None) -> Evaluation | None:
        """Start an evaluation with these weights, or those of that version that `server` has for it, else go on with
        it; None while episodes are left to play."""
        if isinstance(start, Weights):
            self._local.load(start)
            self._evaluator = start_run_evaluation(self._config, self._local.agent)
        elif start is not None:
            judge = RemoteJudge(server, self._config.runtime.collect_timeout)
            self._evaluator = start_run_evaluation(self._config, judge)
        if self._evaluator is None:
            raise RuntimeError("evaluate: there is no evaluation to go on with, expected weights to start one.")
        return self._evaluator.play(self._config.runtime.chunk_seconds)

    @ray.method(concurrency_group="control")
    def interrupt(self) -> None:
        """End the collect under way, and every later one, after the step that is being taken."""
        self._interrupted.set()

    @ray.method(concurrency_group="control")
    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def close(self) -> None:
        if self._rollout is not None:
            self._rollout.close()

    @ray.method(concurrency_group="control")
    def pid(self) -> int:
        return os.getpid()


class ReplayActor:
    """Holds one shard of the replay; chunks are copied in, so that no shared memory stays pinned."""

    def __init__(self, shard: int) -> None:
        self._shard = shard

    def open(self, config: RunConfig, env: EnvSpec, spec: AgentSpec, run_dir: Path) -> str:
        """Allocate the buffer: not in the constructor, whose errors lose their type on the way to the driver. Returns
        the id of this node."""
        self._replay = make_replay(config, env, spec, self._shard)
        self._store = ReplayStore(run_dir, self._shard, config.replay.shards, config.checkpoint.compress)
        self._batch_size, self._exact = spec.batch_size, config.runtime.sync
        self._drawn: deque[float] = deque(maxlen=RECENT_DRAWS)
        return str(ray.get_runtime_context().get_node_id())

    def __repr__(self) -> str:
        return f"replay/{self._shard}"

    def insert(self, chunk: Chunk) -> Acceptance:
        return self._replay.insert(chunk)

    def accepted(self) -> Acceptance:
        return self._replay.accepted()

    def sample(self, batches: int) -> Batches:
        drawn = []
        for _ in range(batches):
            begun = time.monotonic()
            drawn.append(self._replay.draw(self._batch_size))
            self._drawn.append(time.monotonic() - begun)
        return drawn

    def gauges(self) -> dict[str, float]:
        """Seconds that drawing one batch took lately."""
        return {f"replay/sample_seconds_p{p}": float(np.percentile(self._drawn or [0.0], p)) for p in (50, 95)}

    def draw_sequence(self, rows: int, seed: int) -> dict[str, Array] | None:
        return self._replay.draw_sequence(rows, np.random.default_rng(seed))

    def write_back(self, updated: list[WrittenColumns]) -> int:
        """Fresh replay columns from the learner; returns how many rows were already gone."""
        return sum(self._replay.write_back(rows, columns) for rows, columns in updated)

    def snapshot(self) -> None:
        """Copy what a checkpoint needs, as of now."""
        self._snapshot = self._store.snapshot(self._replay, self._exact)

    @ray.method(concurrency_group="saving")
    def write(self, folder: Path, taken: None) -> list[str]:  # noqa: ARG002 - what it waits for
        """Write what `snapshot` took, beside everything else; returns the files that hold its rows."""
        try:
            return self._store.write(folder, self._snapshot)
        finally:
            del self._snapshot

    def save(self, folder: Path) -> list[str]:
        """Snapshot and write at once, without a copy of everything."""
        return self._store.save(folder, self._replay, self._exact)

    def load(self, folder: Path) -> tuple[Acceptance, int]:
        """What was accepted by then, and how many rows are lost with damaged files."""
        lost = self._store.load(folder, self._replay)
        return self._replay.accepted(), lost

    @ray.method(concurrency_group="control")
    def pid(self) -> int:
        return os.getpid()


class LearnerActor:
    """Holds the Agent on its device and updates it from batches; on request it acts for env actors too."""

    def open(self, config: RunConfig, env: EnvSpec, threads: int, version: int) -> AgentSpec:
        """Build the agent, outside of the constructor as in ReplayActor; weights were published up to `version`."""
        torch.set_num_threads(threads)
        self._device = choose_device(config.train.device)
        self._agent = make_run_agent(config, env, self._device, config.train.seed)
        self._version, self._seed, self._train = version, config.train.seed, config.train
        self._publish_every = config.runtime.publish_interval
        self._server: ActingServer | None = None
        self._interrupted = threading.Event()
        return agent_spec(self._agent)

    def __repr__(self) -> str:
        return "learner"

    def serve(self, serving: Serving, incarnation: int) -> None:
        """Act for env actors from now on, with the weights that are published."""
        seed = self._seed + incarnation
        description, threads = self._agent.describe(), torch.get_num_threads()
        self._server = make_server(description, self._device, seed, serving, threads, self._train)

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

    def update(self, batches: Batches) -> tuple[UpdateResult, list[WrittenColumns], Weights | None]:
        """Learn from each batch in turn. Returns three objects of their own: what the coordinator counts, columns
        for replay, and new weights where they are due."""
        begun, before = time.monotonic(), self._agent.updates // self._publish_every
        fresh: list[tuple[Array, FreshColumns]] = []
        written: list[WrittenColumns] = []
        done = 0
        for batch in batches:
            if self._interrupted.is_set():
                break
            fresh.append((batch["rows"], self._agent.learn(_copy(batch))))
            done += 1
        for rows, made in fresh:
            if columns := made.arrays():
                written.append((rows, columns))
        means = self._agent.collect() if done else {}
        due = self._agent.updates // self._publish_every > before
        publishing = time.monotonic()
        weights = self.publish() if due else None
        ended = time.monotonic()
        result = UpdateResult(
            means, done, publishing - begun, ended - publishing if due else 0.0, self._version if due else None
        )
        return result, written, weights

    def publish(self) -> Weights:
        self._version += 1
        weights = Weights(self._version, self._agent.acting_weights())
        if self._server is not None:
            self._server.load(weights)
        return weights

    @ray.method(concurrency_group="control")
    def interrupt(self) -> None:
        """End the updates under way, and every later one, after the one that is being made."""
        self._interrupted.set()

    @ray.method(concurrency_group="control")
    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def picture(self, sequence: dict[str, Array] | None, title: str) -> Array | None:
        return sequence_picture(self._agent.world_model, sequence, title)

    def snapshot(self) -> float:
        """Copy what a checkpoint needs, as of now; returns the seconds that this took."""
        begun = time.monotonic()
        self._snapshot = copy_agent(self._agent)
        return time.monotonic() - begun

    @ray.method(concurrency_group="saving")
    def write(self, folder: Path, taken: float) -> float:
        """Write what `snapshot` took, while updates go on; returns the seconds that learning stood still for it."""
        try:
            write_agent(folder, self._snapshot)
            return taken
        finally:
            del self._snapshot

    def load(self, folder: Path) -> int:
        """Returns the updates that the agent has made."""
        load_agent_state(folder, self._agent)
        return self._agent.updates

    @ray.method(concurrency_group="control")
    def pid(self) -> int:
        return os.getpid()
