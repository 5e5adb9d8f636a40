"""The Ray actors. Each is a shell around one plain class; decisions stand in those classes and in the coordinator."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldloom.catalog import agent_from_description
from worldloom.training.assembly import (
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
from worldloom.training.checkpoint import ReplayStore, load_agent_state, save_agent
from worldloom.training.chunk import Chunk, ChunkInfo
from worldloom.training.config import RunConfig
from worldloom.training.evaluation import Evaluation, Evaluator
from worldloom.training.pictures import sequence_picture
from worldloom.training.replay import Acceptance, as_batch
from worldloom.training.rollout import Rollout
from worldloom.types import Array, Batch, Metrics, Weights

Batches = list[dict[str, Array]]
WrittenColumns = tuple[Array, dict[str, Array]]  # row numbers [B, T] and replay columns [B, T, ...]


@dataclass(frozen=True)
class UpdateResult:
    """What the coordinator counts of a task of several updates."""

    metrics: Metrics  # means
    updates: int
    seconds: float
    published: int | None  # version of the weights published at the end, if any


def _copy(batch: dict[str, Array]) -> Batch:
    """Out of the object store, whose memory is read-only and must not stay pinned."""
    return as_batch({name: torch.from_numpy(np.array(value)) for name, value in batch.items()})


class EnvActor:
    """Runs one Rollout, and evaluations, in a process of its own with one torch thread."""

    def __init__(self, config: RunConfig, description: dict[str, Any], index: int, incarnation: int) -> None:
        torch.set_num_threads(1)
        self._config, self._index = config, index
        self._agent = agent_from_description(description, seed=config.train.seed)
        self._rollout = self._new_rollout(incarnation)
        self._evaluator: Evaluator | None = None
        self._name = f"env/{index:03d}"

    def _new_rollout(self, incarnation: int) -> Rollout:
        config, index = self._config, self._index
        env = make_run_env(config.env, config.env.num_envs, actor_seed(config, index, incarnation))
        return Rollout(env, self._agent, config.train.seed, actor=index, incarnation=incarnation)

    def restart(self, incarnation: int) -> None:
        """Begin all episodes anew; the open ones end where replay has them."""
        self._rollout.env.close()
        self._rollout = self._new_rollout(incarnation)

    def __repr__(self) -> str:
        return self._name

    def collect(self, steps: int, random: bool, weights: Weights | None) -> tuple[Chunk, ChunkInfo]:
        """A chunk for replay, and separately what the coordinator must know of it."""
        if weights is not None:
            self._rollout.load_weights(weights)
        chunk = self._rollout.collect(steps, random, self._config.runtime.chunk_seconds)
        return chunk, chunk.info

    def evaluate(self, weights: Weights | None) -> Evaluation | None:
        """Start an evaluation if weights are given, else go on with it; None while episodes are left to play."""
        if weights is not None:
            self._rollout.load_weights(weights)
            self._evaluator = start_run_evaluation(self._config, self._agent)
        if self._evaluator is None:
            raise RuntimeError("evaluate: there is no evaluation to go on with, expected weights to start one.")
        return self._evaluator.play(self._config.runtime.chunk_seconds)

    def pid(self) -> int:
        return os.getpid()


class ReplayActor:
    """Holds the ReplayBuffer; chunks are copied in, so that no shared memory stays pinned."""

    def open(self, config: RunConfig, env: EnvSpec, spec: AgentSpec, run_dir: Path) -> None:
        """Allocate the buffer: not in the constructor, whose errors lose their type on the way to the driver."""
        self._replay = make_replay(config, env, spec)
        self._store = ReplayStore(run_dir)
        self._batch_size = spec.batch_size

    def __repr__(self) -> str:
        return "replay/0"

    def insert(self, chunk: Chunk) -> Acceptance:
        return self._replay.insert(chunk)

    def accepted(self) -> Acceptance:
        return self._replay.accepted()

    def sample(self, batches: int) -> Batches:
        return [self._replay.draw(self._batch_size) for _ in range(batches)]

    def draw_sequence(self, rows: int, seed: int) -> dict[str, Array] | None:
        return self._replay.draw_sequence(rows, np.random.default_rng(seed))

    def write_back(self, updated: list[WrittenColumns]) -> int:
        """Fresh replay columns from the learner; returns how many rows were already gone."""
        return sum(self._replay.write_back(rows, columns) for rows, columns in updated)

    def save(self, folder: Path, exact: bool) -> list[str]:
        return self._store.save(folder, self._replay, exact)

    def load(self, folder: Path) -> Acceptance:
        self._store.load(folder, self._replay)
        return self._replay.accepted()

    def pid(self) -> int:
        return os.getpid()


class LearnerActor:
    """Holds the Agent on its device and updates it from batches."""

    def open(self, config: RunConfig, env: EnvSpec, threads: int, version: int) -> AgentSpec:
        """Build the agent, outside of the constructor as in ReplayActor; weights were published up to `version`."""
        torch.set_num_threads(threads)
        device = choose_device(config.train.device)
        self._agent = make_run_agent(config, env, device, config.train.seed)
        self._version = version
        self._publish_every = config.runtime.publish_interval
        return agent_spec(self._agent)

    def __repr__(self) -> str:
        return "learner"

    def update(self, batches: Batches) -> tuple[UpdateResult, list[WrittenColumns], Weights | None]:
        """Learn from each batch in turn. Returns three objects of their own: what the coordinator counts, columns
        for replay, and new weights where they are due."""
        begun, before = time.monotonic(), self._agent.updates // self._publish_every
        totals: dict[str, float] = defaultdict(float)
        written: list[WrittenColumns] = []
        for batch in batches:
            metrics, columns = self._agent.update(_copy(batch))
            if columns:
                written.append((batch["rows"], columns))
            for name, value in metrics.items():
                totals[name] += value / len(batches)
        due = self._agent.updates // self._publish_every > before
        weights = self.publish() if due else None
        result = UpdateResult(dict(totals), len(batches), time.monotonic() - begun, self._version if due else None)
        return result, written, weights

    def publish(self) -> Weights:
        self._version += 1
        return Weights(self._version, self._agent.acting_weights())

    def picture(self, sequence: dict[str, Array] | None, title: str) -> Array | None:
        return sequence_picture(self._agent.world_model, sequence, title)

    def save(self, folder: Path) -> None:
        save_agent(folder, self._agent)

    def load(self, folder: Path) -> int:
        """Returns the updates that the agent has made."""
        load_agent_state(folder, self._agent)
        return self._agent.updates

    def pid(self) -> int:
        return os.getpid()
