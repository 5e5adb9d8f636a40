"""Evaluation: whole episodes without exploration noise, on environments of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from worldloom.envs import VectorEnv
from worldloom.types import ActState, Agent, Array

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
        """Over episodes, population."""
        return float(np.std(self.returns))


def evaluate(
    agent: Agent,
    make_env: Callable[[int], VectorEnv],
    episodes: int,
    seed: int,
    on_frame: Callable[[Array], None] | None = None,
) -> Evaluation:
    """Play `episodes` whole episodes; make_env(n) gives n environments.

    The agent's acting generator is seeded for the evaluation and put back, so that evaluating changes no run.
    Each environment plays a fixed share of the episodes: short episodes count no more than long ones.
    """
    if episodes < 1:
        raise ValueError(f"evaluate: episodes is {episodes}, expected at least 1.")
    env = make_env(min(episodes, ENVS_AT_ONCE))
    before = agent.acting_generator.get_state()
    agent.acting_generator.manual_seed(seed)
    try:
        return _play(agent, env, episodes, on_frame)
    finally:
        agent.acting_generator.set_state(before)
        env.close()


def _play(agent: Agent, env: VectorEnv, episodes: int, on_frame: Callable[[Array], None] | None) -> Evaluation:
    count = env.num_envs
    left = np.full(count, episodes // count) + (np.arange(count) < episodes % count)
    returns, lengths = np.zeros(count), np.zeros(count, np.int64)
    done: list[tuple[float, int]] = []
    act_state: ActState | None = None
    obs, is_first = env.reset(), np.ones(count, bool)
    while left.any():
        actions, act_state = agent.act(obs, act_state, is_first, explore=False)
        step = env.step(actions)
        if on_frame:
            on_frame(env.render())
        returns += step.rewards
        lengths += 1
        for e in np.flatnonzero((step.terminated | step.truncated) & (left > 0)):
            done.append((float(returns[e]), int(lengths[e])))
            left[e] -= 1
        obs, is_first = step.obs, step.is_first
        returns[is_first], lengths[is_first] = 0.0, 0
    return Evaluation(tuple(r for r, _ in done), tuple(n for _, n in done))
