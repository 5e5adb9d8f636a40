"""Acting in batches, for many actors at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from worldloom.acting.local import check_version
from worldloom.acting.rollout import Acted
from worldloom.types import ActState, Agent, Array, ObsArray, Weights, join_obs


class Client(NamedTuple):
    """Identifies one vector of environments to the server. A later (incarnation, session) starts with a new state."""

    actor: int
    lane: int
    incarnation: int
    session: int  # number of requests that were given up


@dataclass
class Request:
    """One client's observations, waiting for actions."""

    client: Client
    obs: Mapping[str, Array]
    is_first: Array
    answer: Future[Acted] = field(default_factory=Future)


class Waiting:
    """Requests and weights that wait for the acting thread.

    A batch closes once `rows` environments wait, or `deadline` seconds after the first of them arrived, so that a dead
    or slow client does not delay the others.
    """

    def __init__(self, rows: int, deadline: float) -> None:
        self.rows, self._deadline = rows, deadline
        self._changed = threading.Condition()
        self._requests: list[Request] = []
        self._newest: Weights | None = None  # not taken yet
        self._version = 0  # of the weights that arrived last
        self._closed = False

    def put(self, request: Request) -> None:
        """Add a request. Raises RuntimeError if closed."""
        with self._changed:
            if self._closed:
                raise RuntimeError("the acting server is closed.")
            self._requests.append(request)
            self._changed.notify_all()

    def put_weights(self, weights: Weights) -> None:
        """Replace the newest weights. Raises ValueError if the given ones are older."""
        with self._changed:
            check_version(weights, self._version)
            self._newest, self._version = weights, weights.version

    def take_batch(self) -> list[Request]:
        """Wait for a batch and return it; it is empty once closed and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._requests or self._closed)
            closes = time.monotonic() + self._deadline
            while sum(len(r.is_first) for r in self._requests) < self.rows and not self._closed:
                left = closes - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            batch, self._requests = self._requests, []
            return batch

    def take_weights(self) -> Weights | None:
        """Return the newest weights, or None if they were taken already."""
        with self._changed:
            newest, self._newest = self._newest, None
            return newest

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class EvaluationActing:
    """Acts in one evaluation at a time, with its own agent and the weights that the evaluation began with.

    Does so in a thread of its own, whoever asks: CUDA's libraries have handles for each thread.
    """

    def __init__(self, make_agent: Callable[[], Agent], threads: int = 1) -> None:
        self._make_agent = make_agent
        self._thread = ThreadPoolExecutor(1, "evaluation", torch.set_num_threads, (threads,))
        self._agent: Agent | None = None
        self._state: ActState | None = None

    def begin(self, weights: Weights, seed: int) -> int:
        """Use these weights until the next evaluation begins, and return their version. The same weights and seed play
        the same episodes."""
        return self._thread.submit(self._begin, weights, seed).result()

    def act(self, obs: ObsArray, is_first: Array) -> Array:
        """Return actions [E, A] without exploration. Raises RuntimeError if no evaluation has begun."""
        return self._thread.submit(self._act, obs, is_first).result()

    def close(self) -> None:
        self._thread.shutdown()

    def _begin(self, weights: Weights, seed: int) -> int:
        self._agent = self._agent or self._make_agent()
        self._agent.load_acting_weights(weights.flat)
        self._agent.acting_generator.manual_seed(seed)
        self._state = None
        return weights.version

    def _act(self, obs: ObsArray, is_first: Array) -> Array:
        if self._agent is None:
            raise RuntimeError("act_in_evaluation: no evaluation has begun. Call begin_evaluation first.")
        actions, self._state = self._agent.act(obs, self._state, is_first, explore=False)
        return actions


@dataclass
class Served:
    """Totals of a server since its start."""

    batches: int = 0
    environments: int = 0  # over all batches
    seconds: float = 0.0  # of acting


class ActingServer:
    """Acts for many clients with one agent, in batches, in its own thread; evaluations have another agent.

    make_agent: returns agents that only this server uses, so that learning never changes the weights that act. rows
    and deadline: see `Waiting`. The server keeps the acting states, one row for each environment; a later incarnation
    of a client replaces them.
    """

    def __init__(self, make_agent: Callable[[], Agent], rows: int, deadline: float, threads: int = 1) -> None:
        self._agent, self._version, self._threads = make_agent(), 0, threads
        self._evaluation = EvaluationActing(make_agent, threads)
        self._states: dict[tuple[int, int], tuple[Client, ActState]] = {}  # by actor and lane
        self._waiting, self._served = Waiting(rows, deadline), Served()
        self._thread = threading.Thread(target=self._serve, name="acting", daemon=True)
        self._thread.start()

    def load(self, weights: Weights) -> None:
        """Act with these weights from the next batch on. Raises ValueError if they are older than the last ones."""
        self._waiting.put_weights(weights)

    def act(self, client: Client, obs: Mapping[str, Array], is_first: Array) -> Acted:
        """Return actions for one client, as part of a batch; blocks. obs: replay columns [E, ...].

        A client that this server does not know starts from an empty state, regardless of is_first. Raises the errors
        of the agent, and RuntimeError if the server is closed.
        """
        request = Request(client, obs, np.asarray(is_first))
        self._waiting.put(request)
        return request.answer.result()

    def begin_evaluation(self, weights: Weights, seed: int) -> int:
        """Begin an evaluation (`EvaluationActing.begin`); other clients go on with newer weights."""
        return self._evaluation.begin(weights, seed)

    def act_in_evaluation(self, obs: ObsArray, is_first: Array) -> Array:
        """Return actions [E, A] for the evaluation (`EvaluationActing.act`)."""
        return self._evaluation.act(obs, is_first)

    def close(self) -> None:
        """Answer the requests that wait, then end the threads."""
        self._waiting.close()
        self._thread.join()
        self._evaluation.close()

    def gauges(self) -> dict[str, float]:
        """Return, as means over all batches, the filled share of `rows` and the seconds of acting."""
        served, batches = self._served, max(self._served.batches, 1)
        fill = served.environments / (batches * self._waiting.rows)
        return {"acting/batch_fill": fill, "acting/seconds": served.seconds / batches}

    def _serve(self) -> None:
        torch.set_num_threads(self._threads)  # applies to the calling thread only
        while batch := self._waiting.take_batch():
            begun = time.monotonic()
            try:
                self._load_newest()
                self._act(batch)
            except Exception as error:
                for request in batch:
                    if not request.answer.done():
                        request.answer.set_exception(error)
            self._served.batches += 1
            self._served.environments += sum(len(request.is_first) for request in batch)
            self._served.seconds += time.monotonic() - begun

    def _load_newest(self) -> None:
        if (newest := self._waiting.take_weights()) is not None:
            self._agent.load_acting_weights(newest.flat)
            self._version = newest.version

    def _act(self, batch: list[Request]) -> None:
        obs = {name: np.concatenate([r.obs[name] for r in batch]) for name in batch[0].obs}
        known = [self._state_of(r.client) for r in batch]
        first = np.concatenate([r.is_first | (s is None) for r, s in zip(batch, known, strict=True)])
        actions, after = self._agent.act(join_obs(obs), _join(known, [len(r.is_first) for r in batch]), first)
        columns = self._agent.replay_columns(after)
        begin = 0
        for request in batch:
            part = slice(begin, begin + len(request.is_first))
            begin = part.stop
            self._keep(request.client, {name: value[part] for name, value in after.items()})
            mine = {name: value[part] for name, value in columns.items()}
            request.answer.set_result(Acted(actions[part], mine, self._version))

    def _state_of(self, client: Client) -> ActState | None:
        kept, state = self._states.get(client[:2], (None, None))
        return state if kept == client else None

    def _keep(self, client: Client, state: ActState) -> None:
        """Keep the client's state, unless a later incarnation has one already."""
        kept = self._states.get(client[:2])
        if kept is None or kept[0] <= client:
            self._states[client[:2]] = (client, state)


def _join(states: list[ActState | None], rows: list[int]) -> ActState | None:
    """Join the acting states into one, with zeros for clients that have none; None if no client has one."""
    template = next((state for state in states if state is not None), None)
    if template is None:
        return None
    joined = {}
    for name, like in template.items():
        parts = [
            torch.zeros(count, *like.shape[1:], dtype=like.dtype, device=like.device) if state is None else state[name]
            for state, count in zip(states, rows, strict=True)
        ]
        joined[name] = torch.cat(parts)
    return joined
