"""The changed tasks of the tutorial on fine-tuning."""

import numpy as np
import pytest

from worldloom.envs import make_env


def push(name):
    """Return the cart's speed after one push to the right, less its speed before."""
    env = make_env(name, num_envs=1, seed=0)
    before = env.reset()
    after = env.step(np.array([[0.0, 1.0]], np.float32)).obs
    env.close()
    return after[0, 1] - before[0, 1]


@pytest.mark.parametrize(("name", "times"), [("weak", 0.5), ("backwards", -1.0)])
def test_a_changed_motor_pushes_as_it_says(name, times):
    assert push(f"examples.changed_cartpole:{name}") == pytest.approx(times * push("CartPole-v1"), rel=0.05)


def test_a_changed_cartpole_is_filmed():
    env = make_env("examples.changed_cartpole:weak", render_mode="rgb_array")
    env.reset()
    assert env.render().shape == (400, 600, 3)
    env.close()
