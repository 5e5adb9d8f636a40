"""Acting through a server: what an env actor has in place of an agent, and how the server is built and batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, RayTaskError

from distributed.launcher import DEATHS
from worldloom.acting.rollout import Acted, ActingLost
from worldloom.acting.server import ActingServer, Client
from worldloom.families import agent_from_description
from worldloom.runs.build import configure_agent
from worldloom.runs.config import RunConfig, TrainConfig
from worldloom.types import ActState, Agent, Array, ColumnSpec, ObsArray

LANES = 2  # parts of an actor's environments: one steps while the other waits for its actions


@dataclass(frozen=True)
class Batching:
    """Limits at which an acting server closes a batch."""

    rows: int  # waiting environments that close a batch
    deadline: float  # seconds after which a batch closes anyway
    clients: int  # that may wait at once


def batching(config: RunConfig) -> Batching:
    """A batch closes with one lane of every env actor: by then the other lanes are stepping."""
    actors, envs = max(config.runtime.env_actors, 1), config.env.num_envs
    return Batching(actors * -(-envs // LANES), config.runtime.acting_deadline, LANES * actors + 2)


def lane_sizes(num_envs: int, served: bool) -> list[int]:
    """Number of environments in each lane."""
    lanes = min(LANES, num_envs) if served else 1
    return [len(part) for part in np.array_split(np.arange(num_envs), lanes)]


def make_server(
    description: dict[str, Any], device: str, seed: int, batching: Batching, threads: int, train: TrainConfig
) -> ActingServer:
    """Build an acting server for the agent that `description` names."""

    def make_agent() -> Agent:
        agent = agent_from_description(description, device, seed)
        if torch.device(device).type == "cuda":
            configure_agent(agent, train, device)
        return agent

    return ActingServer(make_agent, batching.rows, batching.deadline, threads)


class RemoteActing:
    """Acts through `server`, an actor that has an ActingServer; see `worldloom.acting.rollout.Acting`."""

    def __init__(self, columns: Mapping[str, ColumnSpec], client: Client, timeout: float) -> None:
        self.columns, self.server = columns, None
        self._client, self._timeout = client, timeout
        self._unanswered = False

    def start(self, seed: int) -> None:
        """Do nothing: the server draws, and resets the state of a client that it does not know."""

    def request(self, obs: Mapping[str, Array], is_first: Array) -> Callable[[], Acted]:
        if self._unanswered:  # the server may have acted on it: a new session resets this client's state there
            self._client = self._client._replace(session=self._client.session + 1)
        self._unanswered = True
        if self.server is None:
            raise ActingLost("there is no acting server.")
        reference = self.server.act.remote(self._client, dict(obs), is_first)
        return lambda: self._receive(reference)

    def _receive(self, reference: Any) -> Acted:
        acted: Acted = answer(reference, self._timeout)
        self._unanswered = False
        return acted


class RemoteEvaluationAgent:
    """Acts in an evaluation through `server`, with the weights that the evaluation began with."""

    def __init__(self, server: Any, timeout: float) -> None:
        self._server, self._timeout = server, timeout
        self.acting_generator = torch.Generator()  # the server has the one that counts

    def act(
        self, obs: ObsArray, act_state: ActState | None, is_first: Array, explore: bool = False
    ) -> tuple[Array, ActState]:
        """See `worldloom.types.Agent`; the acting state stays with the server. Raises ActingLost."""
        if explore:
            raise ValueError("act: an evaluation does not explore.")
        reference = self._server.act_in_evaluation.remote(obs, is_first)
        return answer(reference, self._timeout), act_state or {}


def answer(reference: Any, timeout: float) -> Any:
    """Return the server's answer. Raises ActingLost if it died or is silent, or what its agent raised."""
    try:
        return ray.get(reference, timeout=timeout)
    except GetTimeoutError as error:
        raise ActingLost(f"the acting server gave no answer for {timeout:g} s.") from error
    except DEATHS as error:
        raise ActingLost(f"the acting server died ({type(error).__name__}).") from error
    except RayTaskError as error:
        raise error.cause from error
