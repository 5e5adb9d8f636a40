"""The subject of `check_family`: a family of models on a task with two states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from worldloom.acting.local import LocalActing
from worldloom.acting.rollout import Lane, Rollout
from worldloom.envs import Environment, VectorEnv
from worldloom.families import create_agent
from worldloom.replay.buffer import ReplayBuffer
from worldloom.spaces import observation_columns
from worldloom.types import Agent, Batch, join_obs

ENVS = 3


class Mirror(gymnasium.Env[Any, Any]):
    """A task with two states, one of which is drawn at each step: all of the observation is high or low.

    The reward is the mean over the action's entries. An entry in [-1, 1] gives its value in the high state and minus
    its value in the low one. A choice gives 1 if it is the last in the high state or the first in the low one, else -1.
    An episode has 12 steps.
    """

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed, options=options)
        self.steps = 0
        return self._look(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        sign = 1.0 if self.high else -1.0
        if isinstance(self.action_space, spaces.Box):
            low, high = self.action_space.low, self.action_space.high
            reward = sign * float(np.mean((action - low) / (high - low) * 2 - 1))
        else:
            most = getattr(self.action_space, "nvec", getattr(self.action_space, "n", 2))
            wanted = np.asarray(most) - 1 if self.high else np.zeros_like(np.asarray(most))
            wanted = wanted + getattr(self.action_space, "start", 0)
            reward = float(np.mean(np.where(np.asarray(action) == wanted, 1.0, -1.0)))
        self.steps += 1
        return self._look(), reward, False, self.steps >= 12, {}

    def _look(self) -> Any:
        self.high = bool(self.np_random.integers(2))
        return _shown(self.observation_space, self.high)


def _shown(space: spaces.Space[Any], high: bool) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _shown(part, high) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Box):
        low_value, high_value = (0, 255) if space.dtype == np.uint8 else (-1, 1)
        return np.full(space.shape, high_value if high else low_value, space.dtype)
    return np.full(space.shape or (), int(high), np.int64) + getattr(space, "start", 0)


@dataclass(frozen=True)
class Subject:
    """The family under test, with the spaces of environments that it has to support."""

    name: str
    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    overrides: Mapping[str, Any]

    def environments(self) -> VectorEnv:
        return VectorEnv(lambda: Environment(Mirror(self.observation_space, self.action_space), 1, 12), ENVS, seed=0)

    def agent(self, seed: int = 0) -> Agent:
        env = self.environments()
        return create_agent(
            self.name, env.observation_space, env.action_space, episode_length=12, seed=seed, **self.overrides
        )

    def replay(self, agent: Agent, steps: int = 24, random: bool = False) -> ReplayBuffer:
        """Return replay with rows that this agent collected; random: with random actions instead."""
        env = self.environments()
        columns = observation_columns(env.observation_space)
        replay = ReplayBuffer(
            100_000,
            join_obs({name: column.shape for name, column in columns.items()}),
            env.action_dim,
            obs_dtype=join_obs({name: column.dtype for name, column in columns.items()}),
            windows=agent.windows,
            columns=agent.columns,
        )
        rollout = Rollout([Lane(env, LocalActing(agent))], seed=0)
        replay.insert(rollout.collect(max(steps, 2 * agent.windows.length), random))
        return replay

    def batch(self, agent: Agent) -> Batch:
        return self.replay(agent).sample(agent.batch_size)

    def obs(self, seed: int = 0) -> Any:
        """Draw observations [ENVS, ...] at random."""
        space = self.environments().observation_space
        generator = np.random.default_rng(seed)
        drawn = {}
        for name, column in observation_columns(space).items():
            shape = (ENVS, *column.shape)
            whole = column.dtype != "float32"
            top = 256 if column.dtype == "uint8" else 2
            numbers = generator.integers(top, size=shape) if whole else generator.normal(size=shape)
            drawn[name] = numbers.astype(column.dtype)
        return join_obs(drawn)
