"""The inference actor: an acting server in a process of its own."""

from __future__ import annotations

import ray

from distributed.acting import Batching, make_server
from distributed.actors.pulse import Process
from worldloom.acting.rollout import Acted
from worldloom.acting.server import Client
from worldloom.runs.build import AgentSpec, choose_device
from worldloom.runs.config import RunConfig
from worldloom.types import Array, ObsArray, Weights


class InferenceActor(Process):
    """Holds an ActingServer and nothing else."""

    def open(self, config: RunConfig, spec: AgentSpec, batching: Batching, incarnation: int) -> None:
        device, seed = choose_device(config.train.device), config.train.seed + incarnation
        self._server = make_server(spec.description, device, seed, batching, 1, config.train)

    def __repr__(self) -> str:
        return "inference"

    def load(self, weights: Weights) -> None:
        self._server.load(weights)

    @ray.method(concurrency_group="acting")
    def act(self, client: Client, obs: dict[str, Array], is_first: Array) -> Acted:
        return self._server.act(client, obs, is_first)

    @ray.method(concurrency_group="acting")
    def begin_evaluation(self, weights: Weights, seed: int) -> int:
        return self._server.begin_evaluation(weights, seed)

    @ray.method(concurrency_group="acting")
    def act_in_evaluation(self, obs: ObsArray, is_first: Array) -> Array:
        return self._server.act_in_evaluation(obs, is_first)

    @ray.method(concurrency_group="acting")
    def serving_gauges(self) -> dict[str, float]:
        return self._server.gauges()
