"""Catch: who follows the ball catches all of them, and images show what there is to see."""

import numpy as np
import pytest

from examples.catch import BALL, BALLS, PADDLE, Catch, hard


def played(env, choose, seed):
    _, _ = env.reset(seed=seed)
    total, steps, ended = 0.0, 0, False
    while not ended:
        image, reward, ended, truncated, _ = env.step(choose(env))
        assert env.observation_space.contains(image)
        assert not truncated
        total, steps = total + reward, steps + 1
    return total, steps


def follow(env):
    """Move towards the ball, where it does not lie over the paddle."""
    apart = (env._x + BALL / 2) - (env._paddle + PADDLE / 2)
    return 1 + int(np.sign(apart)) * (abs(apart) > 4)


@pytest.mark.parametrize("make", [Catch, hard])
def test_following_the_ball_catches_all_and_standing_still_does_not(make):
    env = make()
    assert [played(env, follow, seed)[0] for seed in range(20)] == [BALLS] * 20
    still = [played(env, lambda env: 1, seed)[0] for seed in range(20)]
    assert -BALLS < np.mean(still) < 2
    assert played(env, follow, 0)[1] == BALLS * (9 if make is Catch else 13)


def test_one_seed_gives_one_episode_and_the_harder_variant_draws_its_colours_anew():
    first, second = (hard().reset(seed=3)[0] for _ in range(2))
    assert np.array_equal(first, second)
    env = hard()
    colours = {tuple(env.reset(seed=seed)[0][-1, 0]) for seed in range(5)}
    assert len(colours) == 5
    assert {tuple(Catch().reset(seed=seed)[0][-1, 0]) for seed in range(5)} == {(25, 30, 45)}


def test_the_image_shows_ball_and_paddle():
    env = Catch()
    image, _ = env.reset(seed=0)
    ball = np.argwhere((image == (240, 220, 70)).all(-1))
    paddle = np.argwhere((image == (80, 200, 240)).all(-1))
    assert ball.min(0).tolist() == [0, env._x]
    assert len(ball) == BALL**2
    assert paddle.max(0).tolist() == [47, env._paddle + PADDLE - 1]
