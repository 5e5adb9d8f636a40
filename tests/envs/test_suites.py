"""Atari and DeepMind Control as they really run."""

import ctypes.util
import os
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest

from worldloom.acting.rollout import Lane, Rollout
from worldloom.envs import VectorEnv, make_env
from worldloom.envs.environment import Environment
from worldloom.envs.suites import Atari, AtariConfig, DMCConfig, make_dm_control
from worldloom.families import create_agent
from worldloom.runs.config import EnvConfig
from worldloom.spaces import resize_image


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


class Lives(gym.Env):
    """A game of 2 lives and `length` frames, one life lost at frame 6; images as bright as the frame, reward 1 each."""

    observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, length=12):
        self.length, self.seeds = length, []

    def _now(self):
        return np.full((8, 8, 3), 10 * self.count, np.uint8), {"lives": 2 - (self.count >= 6)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.count = 0
        return self._now()

    def step(self, action):
        self.count += 1
        image, info = self._now()
        return image, 1.0, self.count >= self.length, False, info


def lives(length=12, **settings):
    """Return a vector of one such game, 4 frames a step, and the game."""
    game, config = Lives(length), AtariConfig(image_size=8, noops=0, **settings)
    made = Environment(Atari(game, config, 4), marks_lives=config.life_loss == "mark")
    return VectorEnv(lambda: made, 1, 0), game


def played(env, steps):
    """Return of each step: reward, ends, the mark, and the brightness that it led to and of what is acted on next."""
    env.reset()
    found = [env.step(np.eye(2, dtype=np.float32)[:1]) for _ in range(steps)]
    flags = [(float(s.rewards[0]), bool(s.terminated[0]), bool(s.truncated[0]), bool(s.life_lost[0])) for s in found]
    return flags, [(int(s.final_obs.max()), int(s.obs.max())) for s in found]


GOES_ON, ENDS, MARKED = (4.0, False, False, False), (4.0, True, False, False), (4.0, False, False, True)


@pytest.mark.parametrize(
    ("life_loss", "flags"),
    [
        ("ignore", [GOES_ON, GOES_ON, ENDS, GOES_ON]),
        ("mark", [GOES_ON, MARKED, ENDS, GOES_ON]),
        ("end", [GOES_ON, ENDS, ENDS, GOES_ON]),
    ],
)
def test_a_lost_life_ends_the_episode_but_not_the_game_or_is_marked_or_ignored(life_loss, flags):
    env, game = lives(life_loss=life_loss)
    assert played(env, 4) == (flags, [(40, 40), (80, 80), (120, 0), (40, 40)])  # the same image again, no new game
    assert len(game.seeds) == 2


class Nobody:
    """Acts for nobody: actions are random."""

    columns: ClassVar[dict] = {}

    def start(self, seed):
        pass


def test_rows_are_marked_in_an_episode_or_an_episode_for_each_life():
    chunks = {}
    for life_loss in ("mark", "end", "ignore"):
        env, _ = lives(life_loss=life_loss)
        chunks[life_loss] = Rollout([Lane(env, Nobody())], seed=0).collect(3, random=True)
    marked, ended, ignored = ({name: c.tolist() for name, c in chunk.columns.items()} for chunk in chunks.values())
    assert marked["life_lost"] == [0, 0, 1, 0]
    assert marked["terminated"] == ignored["terminated"] == [0, 0, 0, 1]
    assert "life_lost" not in ended.keys() | ignored.keys()
    assert chunks["end"].columns["obs"].max((1, 2, 3)).tolist() == [0, 40, 80, 80, 120]
    assert ended["is_first"] == [1, 0, 0, 1, 0]
    assert ended["terminated"] == [0, 0, 1, 0, 1]
    assert (chunks["mark"].info.returns, chunks["end"].info.returns) == ((12.0,), (8.0, 4.0))


def test_a_life_lost_with_the_game_or_at_the_frame_limit_starts_a_new_game():
    env, game = lives(length=6, life_loss="end")
    assert played(env, 2) == ([GOES_ON, (2.0, True, False, False)], [(40, 40), (60, 0)])
    env, game = lives(life_loss="end", max_frames=8)
    assert played(env, 2) == ([GOES_ON, ENDS], [(40, 40), (80, 0)])
    assert len(game.seeds) == 2


def test_games_start_from_one_seed_or_from_many():
    for same_seed in (False, True):
        env, game = lives(same_seed=same_seed)
        played(env, 6)
        assert (len(set(game.seeds)), len(game.seeds)) == (1 if same_seed else 3, 3)


def test_no_ops_lie_between_the_least_and_the_most():
    game = Lives(100)
    env = Atari(game, AtariConfig(image_size=8, least_noops=2, noops=4), repeat=4)
    counts = {env.reset(seed=seed)[0].max() // 10 for seed in range(50)}
    assert counts == {2, 3, 4}


def test_evaluations_play_whole_games_from_their_own_seeds():
    config = EnvConfig(atari=AtariConfig(life_loss="end", same_seed=True, sticky=0.25))
    assert config.for_evaluation() == EnvConfig(atari=AtariConfig(sticky=0.25))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"least_noops": 31}, "env.atari.least_noops is 31, expected a number from 0 to env.atari.noops=30"),
        ({"least_noops": -1}, "env.atari.least_noops is -1"),
        ({"sticky": 1.0}, "env.atari.sticky is 1.0"),
        ({"max_frames": 0}, "env.atari.max_frames is 0"),
    ],
)
def test_atari_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        AtariConfig(**settings)


def test_an_area_is_the_mean_of_the_pixels_that_it_covers():
    image = np.array([[[10, 20, 30, 40, 50], [10, 20, 30, 40, 50]]], np.uint8)
    found = resize_image(image, 2, area=True)
    assert found.tolist() == [[[18, 42]] * 2]  # (10 + 20 + 30 / 2) / 2.5 and (30 / 2 + 40 + 50) / 2.5
    assert resize_image(np.full((3, 210, 160), 77, np.uint8), 64, area=True).tolist() == [[[77] * 64] * 64] * 3


def test_a_game_of_the_emulator_goes_on_after_a_lost_life():
    fire = np.eye(4, dtype=np.float32)[1:2]
    env = make_env("ALE/Breakout-v5", action_repeat=4, atari=AtariConfig(life_loss="end", resize="area"))
    env.reset()
    for _ in range(200):  # the ball falls past a paddle that stands still
        step = env.step(fire)
        if step.terminated[0]:
            break
    assert step.terminated[0]
    assert (step.obs == step.final_obs).all()
    assert env._envs[0]._env.unwrapped.ale.lives() == 4


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
