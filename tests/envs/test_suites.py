"""Atari and DeepMind Control as they really run."""

import ctypes.util
import os

import numpy as np
import pytest

from worldloom.envs import make_env
from worldloom.envs.suites import AtariConfig, DMCConfig, make_dm_control
from worldloom.families import create_agent


def test_dm_control_gives_flat_states_and_ends_by_its_time_limit():
    env = make_env("dm_control/walker-walk-v0", action_repeat=2)
    assert env.observation_space.shape == (24,)
    assert env.action_dim == 6
    assert env.episode_length == 500
    env.reset()
    rng = np.random.default_rng(0)
    for _ in range(499):
        step = env.step(rng.uniform(-1, 1, (1, 6)).astype(np.float32))
        assert 0 <= step.rewards[0] <= 2
        assert not step.is_first[0]
    step = env.step(np.zeros((1, 6), np.float32))
    assert step.truncated[0]
    assert not step.terminated[0]


def test_dm_control_states_are_concatenated_in_its_own_order():
    """As the authors of TD-MPC2 do: walker's orientations come before its height."""
    env = make_dm_control("dm_control/walker-walk-v0", DMCConfig())
    obs, _ = env.reset(seed=3)
    own = env.unwrapped._env.task.get_observation(env.unwrapped._env.physics)
    assert list(own) == ["orientations", "height", "velocity"]
    np.testing.assert_allclose(obs, np.concatenate([np.ravel(part) for part in own.values()]), rtol=1e-5, atol=1e-6)


renders = pytest.mark.skipif(
    "DISPLAY" not in os.environ and ctypes.util.find_library("EGL") is None, reason="neither a display nor EGL here"
)


@renders
def test_dm_control_pixels_are_rendered_by_the_camera_that_was_asked_for():
    views = {}
    for camera in (None, 0, 1):
        env = make_env("dm_control/walker-walk-v0", dmc=DMCConfig(observations="pixels", camera=camera))
        assert env.observation_space.shape == (3, 64, 64)
        views[camera] = env.reset()
    assert views[None].dtype == np.uint8
    assert views[None].std() > 10  # a real picture
    assert (views[None] == views[0]).all()
    assert (views[None] != views[1]).any()
    step = env.step(np.ones((1, 6), np.float32))
    assert (step.obs != views[1]).any()


@renders
def test_dm_control_states_and_pixels_come_as_a_mapping():
    env = make_env("dm_control/walker-walk-v0", dmc=DMCConfig(observations="both", image_size=48))
    shapes = {key: value.shape for key, value in env.reset().items()}
    assert shapes == {"height": (1, 1), "image": (1, 3, 48, 48), "orientations": (1, 14), "velocity": (1, 9)}


@pytest.mark.parametrize(
    ("atari", "shape", "actions"),
    [
        (AtariConfig(), (3, 64, 64), 6),
        (AtariConfig(image_size=96, grayscale=True, sticky=0.25, full_actions=True), (1, 96, 96), 18),
    ],
)
def test_atari_frames_and_actions_follow_the_settings(atari, shape, actions):
    env = make_env("ALE/Pong-v5", action_repeat=4, atari=atari)
    assert env.observation_space.shape == shape
    assert env.action_classes == (actions,)
    assert env.action_dim == actions
    obs = env.reset()
    assert obs.dtype == np.uint8
    assert obs.max() > 100  # a real picture
    step = env.step(np.eye(actions, dtype=np.float32)[[0]])
    assert step.obs.shape == (1, *shape)
    assert env.episode_length == 27_000


def test_atari_cuts_episodes_at_the_frame_limit_without_a_true_end():
    env = make_env("ALE/Pong-v5", action_repeat=4, atari=AtariConfig(max_frames=40, noops=0))
    env.reset()
    steps = [env.step(np.eye(6, dtype=np.float32)[[0]]) for _ in range(10)]
    assert [bool(step.truncated[0]) for step in steps] == [False] * 9 + [True]
    assert not any(step.terminated[0] for step in steps)


def test_atari_pools_the_last_two_frames_and_repeats_rewards():
    import gymnasium

    from worldloom.envs.suites import Atari

    class Flicker(gymnasium.Env):
        """Odd frames show the left half, even ones the right; a reward of 1 each."""

        observation_space = gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)
        action_space = gymnasium.spaces.Discrete(2)

        def _frame(self):
            frame = np.zeros((8, 8, 3), np.uint8)
            half = slice(0, 4) if self.count % 2 else slice(4, 8)
            frame[:, half] = 200
            return frame

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.count = 0
            return self._frame(), {}

        def step(self, action):
            self.count += 1
            return self._frame(), 1.0, False, False, {}

    env = Atari(Flicker(), AtariConfig(image_size=8, noops=0), repeat=4)
    first, _ = env.reset(seed=0)
    assert first[0, 0].tolist() == [0] * 4 + [200] * 4  # nothing from before the reset
    image, reward, *_ = env.step(0)
    assert (image == 200).all()
    assert reward == 4
    again, _ = env.reset()
    assert again[0, 0].tolist() == [0] * 4 + [200] * 4


def test_box2d_episodes_end_truly_and_reach_td_mpc2():
    env = make_env("LunarLanderContinuous-v3", num_envs=2)
    agent = create_agent("tdmpc2:1m", env.observation_space, env.action_space, episodic=True, horizon=1, iterations=1)
    obs, act_state, first = env.reset(), None, np.ones(2, bool)
    ended = False
    for _ in range(200):
        if first.any():
            _, act_state = agent.act(obs, act_state, first)
        step = env.step(np.tile(np.float32([1, 0]), (2, 1)))  # full thrust flies off
        obs, first, ended = step.obs, step.is_first, ended or step.terminated.any()
    assert ended
    assert obs.shape == (2, 8)
