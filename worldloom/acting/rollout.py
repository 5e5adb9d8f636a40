"""Rollouts: acting in environments, and conversion of Gymnasium's order to the rows of `worldloom.types`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from worldloom.envs import Step, VectorEnv
from worldloom.replay.chunk import LIFE_LOST, Chunk, ChunkBuilder, ChunkInfo, ChunkKey, base_columns
from worldloom.spaces import observation_columns
from worldloom.types import Array, ColumnSpec, action_rows, split_obs


class ActingLost(RuntimeError):
    """The acting backend gave no answer. The request may be repeated, also with another backend."""


class Acted(NamedTuple):
    """Actions for E environments, the replay columns of their rows, and the version of the weights."""

    actions: Array  # [E, A]
    columns: Mapping[str, Array]  # replay columns of the rows acted on, [E, ...]
    version: int  # of the weights that acted


class Acting(Protocol):
    """Acts for one vector of environments and remembers their acting states."""

    columns: Mapping[str, ColumnSpec]  # extra replay columns that the agent asks for

    def start(self, seed: int) -> None:
        """Drop all acting states; if the backend has a random generator of its own, seed it with `seed`."""

    def request(self, obs: Mapping[str, Array], is_first: Array) -> Callable[[], Acted]:
        """Request actions for `obs`, a mapping of replay columns [E, ...]. The returned function waits for them.

        Both raise ActingLost if the backend gives no answer."""


@dataclass
class Ended:
    """The episodes of a lane that ended in a chunk."""

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    true_ends: int = 0


class Lane:
    """A vector of environments that are acted on together.

    The newest row of each environment is held back until an action was chosen for it, because the agent's replay
    columns for that row are known only then. A chunk therefore ends one row before the newest one.
    """

    def __init__(self, env: VectorEnv, acting: Acting) -> None:
        self.env, self.acting = env, acting
        self._columns = {
            **base_columns(observation_columns(env.observation_space), env.action_dim),
            **(LIFE_LOST if env.marks_lives else {}),
            **acting.columns,
        }
        self._all = np.arange(env.num_envs)
        self._pending: dict[str, Array] = {}  # the held-back rows, [E, ...] each
        self._answer: Callable[[], Acted] | None = None
        self._returns, self._lengths = np.zeros(env.num_envs), np.zeros(env.num_envs, np.int64)
        self.waited = 0.0  # seconds of waiting for actions

    def begin(self, steps: int) -> None:
        """Begin a new chunk of at most `steps` vector steps."""
        if not self._pending:
            self._start(split_obs(self.env.reset()), self._all)
        self.builder, self.ended = ChunkBuilder(self._columns, self.env.num_envs, 2 * steps), Ended()
        self._failures = self.env.failures

    def ask(self, rng: np.random.Generator | None) -> None:
        """Request the next actions; with `rng`, draw them at random."""
        if rng is not None:
            actions = action_rows(rng, self.env.num_envs, self.env.action_dim, self.env.action_classes)
            self._answer = lambda: Acted(actions, {}, -1)
            return
        obs = {name: value for name, value in self._pending.items() if name == "obs" or name.startswith("obs/")}
        self._answer = self.acting.request(obs, self._pending["is_first"])

    def step(self) -> int:
        """Step with the requested actions; return the version of the weights that acted, -1 for random actions.

        Raises ActingLost if the backend gives no answer."""
        assert self._answer is not None, "ask comes before step"
        begun = time.monotonic()
        answer, self._answer = self._answer, None
        acted = answer()
        self.waited += time.monotonic() - begun
        step = self.env.step(acted.actions)
        self._pending["truncated"] |= step.failed  # an episode cut short by an error ends truncated
        self.builder.append(self._all, **self._pending, **acted.columns)
        self._advance(acted.actions, step)
        return acted.version

    @property
    def failures(self) -> int:
        """Number of environments that were rebuilt since `begin`."""
        return self.env.failures - self._failures

    def _advance(self, actions: Array, step: Step) -> None:
        """Hold back the row that each environment arrived at; where an episode ended, store the row and start the next
        episode."""
        self._returns += np.where(step.failed, 0, step.rewards)
        self._lengths += ~step.failed
        arrived: dict[str, Any] = {
            **split_obs(step.final_obs),
            "actions": actions,
            "rewards": step.rewards,
            "is_first": np.zeros(self.env.num_envs, bool),
            "terminated": step.terminated,
            "truncated": step.truncated & ~step.terminated,
            "life_lost": step.life_lost,
        }
        ended = np.flatnonzero(step.terminated | step.truncated)
        if len(ended):
            self.builder.append(ended, **{name: value[ended] for name, value in arrived.items()})
            self.ended.returns += self._returns[ended].tolist()
            self.ended.lengths += self._lengths[ended].tolist()
            self.ended.true_ends += int(step.terminated[ended].sum())
        self._pending = {name: np.array(value) for name, value in arrived.items()}
        first = np.flatnonzero(step.is_first)
        if len(first):
            self._start({name: value[first] for name, value in split_obs(step.obs).items()}, first)

    def _start(self, obs: dict[str, Array], envs: Array) -> None:
        """Hold back is_first rows for `envs`; obs: by column. No action led to them, so action and reward are zero."""
        if not self._pending:
            count = self.env.num_envs
            self._pending = {
                name: np.zeros((count, *column.shape), column.dtype)
                for name, column in self._columns.items()
                if name not in self.acting.columns
            }
        for name, value in self._pending.items():
            value[envs] = obs.get(name, 0)
        self._pending["is_first"][envs] = True
        self._returns[envs], self._lengths[envs] = 0.0, 0


class Rollout:
    """Acts in one lane of environments, or in several in turn, and returns chunks of rows.

    With several lanes, the actions of one lane are computed while the environments of another step. This hides the
    latency of an acting server.
    """

    def __init__(self, lanes: Sequence[Lane], seed: int, actor: int = 0, incarnation: int = 0) -> None:
        self.lanes = list(lanes)
        self._actor, self._incarnation, self._sequence = actor, incarnation, 0
        self._rng = np.random.default_rng([seed, actor, incarnation])
        for lane in self.lanes:
            lane.acting.start(int(self._rng.integers(2**31)))

    @property
    def num_envs(self) -> int:
        return sum(lane.env.num_envs for lane in self.lanes)

    def collect(
        self,
        steps: int,
        random: bool = False,
        seconds: float = float("inf"),
        stop: Callable[[], bool] = lambda: False,
    ) -> Chunk:
        """Step the environments `steps` times, or until `seconds` have passed or `stop` returns true.

        random: act uniformly at random. If the backend gives no answer, the chunk ends early and `acting_lost` holds
        the reason. Raises EnvironmentFailed if an environment fails too often.
        """
        began, waited = time.monotonic(), self._waited()
        for lane in self.lanes:
            lane.begin(steps)
        versions, lost = self._step_in_turn(
            steps, self._rng if random else None, lambda: time.monotonic() - began > seconds or stop()
        )
        columns = [lane.builder.columns() for lane in self.lanes]
        together = {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}
        info = ChunkInfo(
            key=ChunkKey(self._actor, self._incarnation, self._sequence),
            steps=int((~together["is_first"]).sum()),
            version=min([v for v in versions if v >= 0], default=None),
            returns=tuple(total for lane in self.lanes for total in lane.ended.returns),
            episode_lengths=tuple(length for lane in self.lanes for length in lane.ended.lengths),
            true_ends=sum(lane.ended.true_ends for lane in self.lanes),
            failures=sum(lane.failures for lane in self.lanes),
            last_failure=next((lane.env.last_failure for lane in self.lanes if lane.env.last_failure), ""),
            seconds=time.monotonic() - began,
            waited=self._waited() - waited,
            acting_lost=lost,
        )
        self._sequence += 1
        return Chunk(together, tuple(n for lane in self.lanes for n in lane.builder.lengths()), info)

    def _step_in_turn(
        self, steps: int, rng: np.random.Generator | None, enough: Callable[[], bool]
    ) -> tuple[list[int], str]:
        """Step each lane in turn. Return the versions of the weights that acted, and the error if the backend gave no
        answer."""
        versions: list[int] = []
        try:
            for lane in self.lanes:
                lane.ask(rng)
            for n in range(steps):
                last = n + 1 == steps or enough()
                for lane in self.lanes:
                    versions.append(lane.step())
                    if not last:
                        lane.ask(rng)
                if last:
                    break
        except ActingLost as error:
            return versions, str(error)
        return versions, ""

    def _waited(self) -> float:
        return sum(lane.waited for lane in self.lanes)

    def close(self) -> None:
        """Close the environments."""
        for lane in self.lanes:
            lane.env.close()
