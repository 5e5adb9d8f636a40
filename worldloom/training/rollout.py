"""Acting in environments: the one place where Gymnasium's order becomes rows that arrive."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from worldloom.envs import Step, VectorEnv
from worldloom.spaces import observation_columns
from worldloom.training.chunk import Chunk, ChunkBuilder, ChunkInfo, ChunkKey, base_columns
from worldloom.types import ActState, Agent, Array, ObsArray, Weights, action_rows, join_obs, split_obs


class Rollout:
    """Acts in a vector of environments with the newest weights and returns chunks of rows.

    The row of the observation about to be acted on is held back until it was acted on, because the agent's replay
    columns for it are known only then: a chunk ends one row before what the environments have reached.
    """

    def __init__(self, env: VectorEnv, agent: Agent, seed: int, actor: int = 0, incarnation: int = 0) -> None:
        self.env, self.agent, self.version = env, agent, 0
        self._actor, self._incarnation, self._sequence = actor, incarnation, 0
        self._rng = np.random.default_rng([seed, actor, incarnation])
        agent.acting_generator.manual_seed(int(self._rng.integers(2**31)))
        self._columns = {
            **base_columns(observation_columns(env.observation_space), env.action_dim),
            **agent.columns,
        }
        self._all = np.arange(env.num_envs)
        self._act_state: ActState | None = None
        self._pending: dict[str, Array] = {}  # the held-back rows, [E, ...] each
        self._returns, self._lengths = np.zeros(env.num_envs), np.zeros(env.num_envs, np.int64)

    def load_weights(self, weights: Weights) -> None:
        """Act with these from now on. Raises ValueError if the version goes back."""
        if weights.version < self.version:
            raise ValueError(f"weights of version {weights.version} came after version {self.version}.")
        self.agent.load_acting_weights(weights.flat)
        self.version = weights.version

    def collect(self, steps: int, random: bool = False, seconds: float = float("inf")) -> Chunk:
        """Step the environments `steps` times, fewer once `seconds` have passed.

        random: act uniformly at random. Raises EnvironmentFailed when an environment cannot be kept alive.
        """
        if not self._pending:
            self._start(split_obs(self.env.reset()), self._all)
        builder = ChunkBuilder(self._columns, self.env.num_envs, 2 * steps)
        episodes: list[tuple[float, int, bool]] = []
        failures, began = self.env.failures, time.monotonic()
        for _ in range(steps):
            actions, extra = self._act(random)
            step = self.env.step(actions)
            self._pending["truncated"] |= step.failed  # an episode cut short by an error ends truncated
            builder.append(self._all, **self._pending, **extra)
            self._advance(actions, step, builder, episodes)
            if time.monotonic() - began > seconds:
                break
        columns = builder.columns()
        info = ChunkInfo(
            key=ChunkKey(self._actor, self._incarnation, self._sequence),
            steps=int((~columns["is_first"]).sum()),
            version=self.version,
            returns=tuple(total for total, _, _ in episodes),
            episode_lengths=tuple(length for _, length, _ in episodes),
            true_ends=sum(true_end for _, _, true_end in episodes),
            failures=self.env.failures - failures,
            last_failure=self.env.last_failure,
            seconds=time.monotonic() - began,
        )
        self._sequence += 1
        return Chunk(columns, builder.lengths(), info)

    def _act(self, random: bool) -> tuple[Array, dict[str, Array]]:
        if random:
            actions = action_rows(self._rng, self.env.num_envs, self.env.action_dim, self.env.action_classes)
            return actions, {}
        obs: ObsArray = join_obs(self._pending)
        actions, self._act_state = self.agent.act(obs, self._act_state, self._pending["is_first"])
        return actions, self.agent.replay_columns(self._act_state)

    def _advance(
        self, actions: Array, step: Step, builder: ChunkBuilder, episodes: list[tuple[float, int, bool]]
    ) -> None:
        """Hold back the row each environment arrived at; where an episode ended, file it and start the next."""
        self._returns += np.where(step.failed, 0, step.rewards)
        self._lengths += ~step.failed
        arrived: dict[str, Any] = {
            **split_obs(step.final_obs),
            "actions": actions,
            "rewards": step.rewards,
            "is_first": np.zeros(self.env.num_envs, bool),
            "terminated": step.terminated,
            "truncated": step.truncated & ~step.terminated,
        }
        ended = np.flatnonzero(step.terminated | step.truncated)
        if len(ended):
            builder.append(ended, **{name: value[ended] for name, value in arrived.items()})
            episodes += [(float(self._returns[e]), int(self._lengths[e]), bool(step.terminated[e])) for e in ended]
        self._pending = {name: np.array(value) for name, value in arrived.items()}
        first = np.flatnonzero(step.is_first)
        if len(first):
            self._start({name: value[first] for name, value in split_obs(step.obs).items()}, first)

    def _start(self, obs: dict[str, Array], envs: Array) -> None:
        """Hold back is_first rows for `envs`: no action led here, so action and reward are zero; obs by column."""
        if not self._pending:
            count = self.env.num_envs
            self._pending = {
                name: np.zeros((count, *column.shape), column.dtype)
                for name, column in self._columns.items()
                if name not in self.agent.columns
            }
        for name, value in self._pending.items():
            value[envs] = obs.get(name, 0)
        self._pending["is_first"][envs] = True
        self._returns[envs], self._lengths[envs] = 0.0, 0
