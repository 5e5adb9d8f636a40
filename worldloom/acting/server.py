"""Acting in batches, for many actors at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from worldloom.acting.local import check_version
from worldloom.acting.rollout import Acted
from worldloom.types import ActState, Agent, Array, ObsArray, Weights, join_obs


class Client(NamedTuple):
    """Whom a server acts for: one vector of environments of one actor. A later (incarnation, session) starts anew."""

    actor: int
    lane: int
    incarnation: int
    session: int  # counts the requests that were given up


@dataclass
class Request:
    """One client's observations, waiting for actions."""

    client: Client
    obs: Mapping[str, Array]
    is_first: Array
    answer: Future[Acted] = field(default_factory=Future)


class ActingServer:
    """Acts for many clients with one agent, in batches, in a thread of its own; evaluations have another agent.

    make_agent: gives agents that this server alone uses, so that learning never changes weights that act.
    A batch closes once `rows` environments wait, or `deadline` seconds after the first of them came: a client that died
    or is slow holds nobody up. Acting states stay here, a row for each environment, and go with their incarnation.
    """

    def __init__(self, make_agent: Callable[[], Agent], rows: int, deadline: float, threads: int = 1) -> None:
        self._make_agent, self._agent = make_agent, make_agent()
        self._rows, self._deadline, self._threads = rows, deadline, threads
        self._judging = threading.Lock()
        self._judge: Agent | None = None
        self._judge_state: ActState | None = None
        self._states: dict[tuple[int, int], tuple[Client, ActState]] = {}  # by actor and lane
        self._changed = threading.Condition()
        self._waiting: list[Request] = []
        self._newest: Weights | None = None  # not taken up yet
        self._version = 0
        self._closed = False
        self._batches = self._acted = 0  # batches, and environments in them
        self._seconds = 0.0  # of acting
        self._thread = threading.Thread(target=self._serve, name="acting", daemon=True)
        self._thread.start()

    def load(self, weights: Weights) -> None:
        """Act with these from the next batch on. Raises ValueError if the version goes back."""
        with self._changed:
            check_version(weights, self._newest.version if self._newest else self._version)
            self._newest = weights

    def act(self, client: Client, obs: Mapping[str, Array], is_first: Array) -> Acted:
        """Actions for one client, as part of a batch; blocks. obs by replay column, [E, ...] each.

        A client that this server does not know starts afresh, whatever is_first says. Raises what the agent raises,
        RuntimeError once the server is closed.
        """
        request = Request(client, obs, np.asarray(is_first))
        with self._changed:
            if self._closed:
                raise RuntimeError("the acting server is closed.")
            self._waiting.append(request)
            self._changed.notify_all()
        return request.answer.result()

    def begin_evaluation(self, weights: Weights, seed: int) -> int:
        """Act with these weights in `act_in_evaluation` until another evaluation begins, while others go on with newer
        ones: the same weights and seed play the same episodes. Returns the version."""
        with self._judging:
            self._judge = self._judge or self._make_agent()
            self._judge.load_acting_weights(weights.flat)
            self._judge.acting_generator.manual_seed(seed)
            self._judge_state = None
        return weights.version

    def act_in_evaluation(self, obs: ObsArray, is_first: Array) -> Array:
        """Actions [E, A] without exploration, for the one vector of environments that the evaluation plays on."""
        with self._judging:
            if self._judge is None:
                raise RuntimeError("act_in_evaluation: begin_evaluation comes first.")
            actions, self._judge_state = self._judge.act(obs, self._judge_state, is_first, explore=False)
            return actions

    def close(self) -> None:
        """Answer what waits, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def gauges(self) -> dict[str, float]:
        """By name: the share of `rows` that a batch held and the seconds that acting took, means since the start."""
        batches = max(self._batches, 1)
        return {"acting/batch_fill": self._acted / (batches * self._rows), "acting/seconds": self._seconds / batches}

    def _serve(self) -> None:
        torch.set_num_threads(self._threads)  # holds for the calling thread
        while batch := self._next_batch():
            begun = time.monotonic()
            try:
                self._take_up_weights()
                self._act(batch)
            except Exception as error:
                for request in batch:
                    if not request.answer.done():
                        request.answer.set_exception(error)
            self._batches += 1
            self._acted += sum(len(request.is_first) for request in batch)
            self._seconds += time.monotonic() - begun

    def _next_batch(self) -> list[Request]:
        """Empty once the server is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            closes = time.monotonic() + self._deadline
            while sum(len(r.is_first) for r in self._waiting) < self._rows and not self._closed:
                left = closes - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            batch, self._waiting = self._waiting, []
            return batch

    def _take_up_weights(self) -> None:
        with self._changed:
            newest, self._newest = self._newest, None
        if newest is not None:
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
        """Unless a later incarnation has come meanwhile."""
        kept = self._states.get(client[:2])
        if kept is None or kept[0] <= client:
            self._states[client[:2]] = (client, state)


def _join(states: list[ActState | None], rows: list[int]) -> ActState | None:
    """One acting state for all, with zeros for those that have none; None if nobody has one."""
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
