"""Evaluation: whole episodes without exploration noise, on environments of their own."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from worldloom.envs import VectorEnv
from worldloom.types import ActState, Agent, Array, ObsArray, join_obs, split_obs

ENVS_AT_ONCE = 16


@dataclass(frozen=True)
class Evaluation:
    """Returns and lengths (agent steps) of the episodes, in no particular order."""

    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """Population standard deviation over the episodes."""
        return float(np.std(self.returns))


class Player(Protocol):
    """The part of an agent that an evaluation needs; see `worldloom.types.Agent`."""

    acting_generator: torch.Generator

    def act(
        self, obs: ObsArray, act_state: ActState | None, is_first: Array, explore: bool = True
    ) -> tuple[Array, ActState]:
        """Return actions [E, A] and the next acting state."""


class Evaluator:
    """Plays `episodes` whole episodes on `env`, in one or several calls of `play`.

    `env` is closed at the end, and by an error or Ctrl-C in `play`.

    The agent's acting generator is seeded for the evaluation and restored afterwards, so that an evaluation does not
    change the run. Each environment plays a fixed share of the episodes: short episodes count no more than long ones.
    """

    def __init__(self, agent: Player, env: VectorEnv, episodes: int, seed: int) -> None:
        self._agent, self._env = agent, env
        count = env.num_envs
        self._left = np.full(count, episodes // count) + (np.arange(count) < episodes % count)
        self._returns, self._lengths = np.zeros(count), np.zeros(count, np.int64)
        self._done: list[tuple[float, int]] = []
        self._act_state: ActState | None = None
        self._obs, self._is_first = env.reset(), np.ones(count, bool)
        self._generator = torch.Generator(agent.acting_generator.device).manual_seed(seed).get_state()

    @property
    def frames_per_second(self) -> float:
        """Frame rate at which a film of the frames from `play` runs at the environment's own speed."""
        return self._env.frames_per_second

    def play(self, seconds: float = float("inf"), on_frame: Callable[[Array], None] | None = None) -> Evaluation | None:
        """Play for `seconds`, or to the end; return None while episodes are left.

        on_frame gets each frame of the first environment while it plays its share; this needs environments made with
        render_mode="rgb_array"."""
        generator, begun = self._agent.acting_generator, time.monotonic()
        before = generator.get_state()
        generator.set_state(self._generator)
        try:
            while self._left.any():
                self._step(on_frame)
                if time.monotonic() - begun > seconds and self._left.any():
                    return None
        except BaseException:  # Ctrl-C, too, must not leave windows and simulators behind
            self._env.close()
            raise
        finally:
            self._generator = generator.get_state()
            generator.set_state(before)
        self._env.close()
        return Evaluation(tuple(r for r, _ in self._done), tuple(n for _, n in self._done))

    def finish(self, on_frame: Callable[[Array], None] | None = None) -> Evaluation:
        """Play the episodes that are left."""
        result = self.play(on_frame=on_frame)
        assert result is not None, "play without a limit ends"
        return result

    def _step(self, on_frame: Callable[[Array], None] | None) -> None:
        actions, self._act_state = self._agent.act(self._obs, self._act_state, self._is_first, explore=False)
        if on_frame and self._left[0]:  # before the step, because it resets an environment whose episode ends
            on_frame(self._env.render())
        step = self._env.step(actions)
        self._returns += step.rewards
        self._lengths += 1
        for e in np.flatnonzero((step.terminated | step.truncated) & (self._left > 0)):
            self._done.append((float(self._returns[e]), int(self._lengths[e])))
            self._left[e] -= 1
        self._obs, self._is_first = step.obs, step.is_first
        self._returns[self._is_first], self._lengths[self._is_first] = 0.0, 0


def record_episode(agent: Agent, env: VectorEnv, rows: int, seed: int) -> tuple[Any, Array, Array]:
    """Play one episode without exploration, for at most `rows` rows, and close `env`.

    Returns obs [T, ...] (or a mapping), actions [T, A] and rewards [T], aligned as rows (`worldloom.types`)."""
    agent.acting_generator.manual_seed(seed)
    with closing(env):
        seen, act_state, is_first = env.reset(), None, np.ones(1, bool)
        obs, actions, rewards = [split_obs(seen)], [np.zeros((1, env.action_dim), np.float32)], [0.0]
        while len(obs) < rows:
            action, act_state = agent.act(seen, act_state, is_first, explore=False)
            step = env.step(action)
            obs.append(split_obs(step.final_obs))
            actions.append(action)
            rewards.append(float(step.rewards[0]))
            if step.is_first[0]:
                break
            seen, is_first = step.obs, step.is_first
    columns = {name: np.concatenate([each[name] for each in obs]) for name in obs[0]}
    return join_obs(columns), np.concatenate(actions), np.array(rewards, np.float32)


def evaluate(
    agent: Agent,
    make_env: Callable[[int], VectorEnv],
    episodes: int,
    seed: int,
    on_frame: Callable[[Array], None] | None = None,
) -> Evaluation:
    """Play `episodes` whole episodes; make_env(n) returns n environments (see `Evaluator`)."""
    return start_evaluation(agent, make_env, episodes, seed).finish(on_frame)


def start_evaluation(agent: Player, make_env: Callable[[int], VectorEnv], episodes: int, seed: int) -> Evaluator:
    """Return an Evaluator on at most ENVS_AT_ONCE environments. Raises ValueError for fewer than one episode."""
    if episodes < 1:
        raise ValueError(f"evaluate: episodes is {episodes}, expected at least 1.")
    return Evaluator(agent, make_env(min(episodes, ENVS_AT_ONCE)), episodes, seed)
