"""Rally, the task to judge imagined frames by: its rules, and how a frame is read."""

import numpy as np
from gymnasium.utils.env_checker import check_env

from examples.rally import LAST, LIMIT, PADDLE, SIZE, Rally, read_frames


def follow(env):
    """The action that keeps the paddle under the ball."""
    ball, paddle = env._x + 1, env._paddle + PADDLE // 2
    return 0 if abs(ball - paddle) < 2 else 1 if ball < paddle else 2


def test_rally_is_an_environment():
    check_env(Rally(), skip_render_check=True)


def test_frames_tell_ball_and_paddle_even_when_blurred():
    env, rng = Rally(), np.random.default_rng(0)
    image, _ = env.reset(seed=0)
    ends = 0
    for _ in range(500):
        frame = image.transpose(2, 0, 1)
        expected = (env._x, env._y, env._paddle)
        assert tuple(read_frames(frame)) == expected
        assert tuple(read_frames(frame / 127.5 - 1 + rng.normal(0, 0.2, frame.shape))) == expected
        image, _, done, _, _ = env.step(rng.integers(3))
        if done:
            ends += 1
            image, _ = env.reset()
    assert ends > 5
    frames = np.stack([frame, frame])
    assert read_frames(np.stack([frames, frames])).shape == (2, 2, 3)


def test_a_paddle_under_the_ball_earns_a_point_each_time_and_a_miss_ends_the_episode():
    env = Rally()
    env.reset(seed=1)
    rewards = []
    for step in range(LIMIT):
        before = (env._x, env._y)
        _, reward, done, cut, _ = env.step(follow(env))
        rewards.append(reward)
        assert not done
        assert cut == (step == LIMIT - 1)
        assert abs(env._x - before[0]) == 1
        assert abs(env._y - before[1]) == 1
        assert reward == (1.0 if env._y == LAST else 0.0)
    assert sum(rewards) == LIMIT // (2 * LAST)
    env.reset(seed=1)
    outcome = [env.step(1 if env._x > SIZE // 2 else 2)[1:3] for _ in range(2 * LAST)]  # away from the ball
    assert (-1.0, True) in outcome
    assert all(done == (reward < 0) for reward, done in outcome)


def test_one_frame_does_not_tell_what_comes_next():
    env, found = Rally(), set()
    env.reset(seed=0)
    for right in (-1, 1):
        env._x, env._y, env._right, env._down, env._paddle = 7, 7, right, 1, 6
        seen = env.render()
        env.step(0)
        found.add((seen.tobytes(), env._x))
    assert len({image for image, _ in found}) == 1 < len(found)
