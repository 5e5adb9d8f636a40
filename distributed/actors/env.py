"""The env actor: a Rollout, and evaluations, in a process of its own."""

from __future__ import annotations

import threading
from functools import cached_property
from typing import Any

import ray
import torch

from distributed.acting import RemoteActing, RemoteEvaluationAgent, lane_sizes
from distributed.actors.pulse import Process
from worldloom.acting.evaluation import Evaluation
from worldloom.acting.local import LocalActing
from worldloom.acting.rollout import Lane, Rollout
from worldloom.acting.server import Client
from worldloom.families import agent_from_description
from worldloom.replay.chunk import Chunk, ChunkInfo
from worldloom.runs.build import AgentSpec, EnvFactory, RunEvaluation, actor_seed
from worldloom.runs.config import RunConfig
from worldloom.types import Weights


class EnvActor(Process):
    """Runs one Rollout, and evaluations, with one torch thread.

    served: whether a server acts for it; it then holds no agent.
    """

    def __init__(self, config: RunConfig, spec: AgentSpec, index: int, incarnation: int, served: bool) -> None:
        super().__init__()
        self._config, self._spec, self._index, self._served = config, spec, index, served
        self._incarnation = incarnation
        self._envs = EnvFactory(config.env)  # used in the thread that steps them: a renderer belongs to its thread
        self._rollout: Rollout | None = None
        self._evaluation: RunEvaluation | None = None
        self._interrupted = threading.Event()

    def __repr__(self) -> str:
        return f"env/{self._index:03d}"

    @cached_property
    def _local(self) -> LocalActing:
        """A copy of the agent in this process, with one torch thread."""
        torch.set_num_threads(1)
        return LocalActing(agent_from_description(self._spec.description, seed=self._config.train.seed))

    def build(self) -> list[float] | None:
        """Build environments for a while; return the seconds that each took, or None while some are left to build."""
        runtime, num_envs = self._config.runtime, self._config.env.num_envs
        return self._envs.seconds[-num_envs:] if self._envs.build_ahead(num_envs, runtime.chunk_seconds) else None

    def _new_rollout(self) -> Rollout:
        config, index, incarnation = self._config, self._index, self._incarnation
        lanes = []
        for number, size in enumerate(lane_sizes(config.env.num_envs, self._served)):
            env = self._envs.vector(size, actor_seed(config, index, incarnation, number))
            acting = self._local if not self._served else self._remote_acting(number)
            lanes.append(Lane(env, acting))
        return Rollout(lanes, config.train.seed, actor=index, incarnation=incarnation)

    def _remote_acting(self, lane: int) -> RemoteActing:
        client = Client(self._index, lane, self._incarnation, session=0)
        return RemoteActing(self._spec.columns, client, self._config.runtime.collect_timeout / 2)

    def restart(self, incarnation: int) -> None:
        """Start new episodes in every environment; the open ones end where replay has them."""
        self.close()
        self._rollout, self._incarnation = None, incarnation

    def collect(self, steps: int, random: bool, weights: Weights | None, server: Any = None) -> tuple[Chunk, ChunkInfo]:
        """Return a chunk for replay, and separately what the coordinator must know about it."""
        if weights is not None:
            self._local.load(weights)
        self._rollout = self._rollout or self._new_rollout()
        for lane in self._rollout.lanes:
            if isinstance(lane.acting, RemoteActing):
                lane.acting.server = server
        chunk = self._rollout.collect(steps, random, self._config.runtime.collect_seconds, self._interrupted.is_set)
        return chunk, chunk.info

    def evaluate(self, start: Weights | int | None, server: Any = None) -> Evaluation | None:
        """Build one environment of an evaluation, or play its episodes for a while; return the result, or None while
        something is left to do.

        start: weights to start a new evaluation with, or the version that `server` holds for it; None to go on.
        Raises RuntimeError if there is no evaluation to go on with.
        """
        if isinstance(start, Weights):
            self._local.load(start)
            self._evaluation = RunEvaluation(self._config, self._local.agent)
        elif start is not None:
            agent = RemoteEvaluationAgent(server, self._config.runtime.collect_timeout)
            self._evaluation = RunEvaluation(self._config, agent)
        if self._evaluation is None:
            raise RuntimeError("evaluate: there is no evaluation to go on with, expected weights to start one.")
        return self._evaluation.play(self._config.runtime.chunk_seconds)

    @ray.method(concurrency_group="control")
    def interrupt(self) -> None:
        """End the current collect, and every later one, after one more step."""
        self._interrupted.set()

    def close(self) -> None:
        if self._rollout is not None:
            self._rollout.close()
