"""CartPole-v1 with another motor: changed tasks to fine-tune an agent of CartPole-v1 on.

python -m launch.train --config configs/tdmpc2_cartpole.yaml --from runs/NAME --env.id examples.changed_cartpole:weak
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv


def weak(render_mode: str | None = None) -> gym.Env[Any, Any]:
    """Return CartPole-v1 whose motor pushes with 5 N instead of 10 N."""
    return _with_force(5.0, render_mode)


def backwards(render_mode: str | None = None) -> gym.Env[Any, Any]:
    """Return CartPole-v1 whose motor pushes left where it should push right, and the other way round."""
    return _with_force(-10.0, render_mode)


def _with_force(newtons: float, render_mode: str | None) -> gym.Env[Any, Any]:
    env = gym.make("CartPole-v1", render_mode=render_mode)
    cartpole = env.unwrapped
    assert isinstance(cartpole, CartPoleEnv)
    cartpole.force_mag = newtons
    return env
