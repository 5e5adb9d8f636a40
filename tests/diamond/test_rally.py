"""Rally, the task to judge imagined frames by: its rules, and how a frame is read."""

import dataclasses

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from examples import judge_rally
from examples.rally import LAST, LIMIT, PADDLE, SIZE, Rally, read_frames
from worldloom import create_agent
from worldloom.adamw import GuardedAdamW, Part
from worldloom.diamond import SIZES, DiamondConfig
from worldloom.diamond.denoiser import Denoiser
from worldloom.diamond.rows import as_frames
from worldloom.runs.build import make_run_env
from worldloom.runs.config import EnvConfig


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


def clumsy_rows(count, seed=0):
    """Frames [count, 3, 16, 16], the actions that led to them and episode numbers [count]; 30 % of moves are random."""
    env, rng = Rally(), np.random.default_rng(seed)
    images, actions, episodes, fresh = [], [], [], True
    while len(images) < count:
        if fresh:
            image, _ = env.reset(seed=seed if not images else None)
            action, episode, fresh = 0, (episodes[-1] + 1 if images else 0), False
        else:
            action = int(rng.integers(3)) if rng.random() < 0.3 else follow(env)
            image, _, done, cut, _ = env.step(action)
            fresh = done or cut
        images.append(image.transpose(2, 0, 1))
        actions.append(action)
        episodes.append(episode)
    return as_frames(torch.from_numpy(np.stack(images))), torch.tensor(actions), torch.tensor(episodes)


def open_loops(model, frames, actions, episodes, starts=64, steps=15):
    """Shares of frames whose ball and paddle are right to a pixel [steps], and mean squared errors of drawn frames, and
    of the last seen frame, under the true actions."""
    rows = torch.arange(len(frames) - steps - 4)
    inside = rows[episodes[rows] == episodes[rows + 3 + steps]]
    chosen = inside[torch.linspace(0, len(inside) - 1, starts).long()]
    context, right, errors = frames[chosen[:, None] + torch.arange(4)], [], []
    last = context[:, -1]
    for step in range(steps):
        moves = actions[chosen[:, None] + step + 1 + torch.arange(4)]
        drawn = model.sample(context, moves, model.draw_frame_noise((), starts, None))[-1]
        truth = frames[chosen + step + 4]
        distance = np.abs(read_frames(drawn.numpy()) - read_frames(truth.numpy())).max(-1)
        right.append(float((distance <= 1).mean()))
        errors.append([(drawn - truth).square().mean().item(), (last - truth).square().mean().item()])
        context = torch.cat([context[:, 1:], drawn[:, None]], 1)
    return right, np.mean(errors, 0)


@pytest.mark.slow  # two minutes
def test_a_thousand_updates_foresee_fifteen_frames():
    torch.manual_seed(0)
    frames, actions, episodes = clumsy_rows(10_000)
    config = DiamondConfig(**SIZES["tiny"])
    model = Denoiser((3, 16, 16), 3, config)
    optimizer = GuardedAdamW([Part(model, config.clip_denoiser, config.decay)], config.lr, config.warmup)
    for _ in range(1000):
        rows = torch.randint(len(frames) - config.denoised_rows, (16, 1)) + torch.arange(config.denoised_rows)
        optimizer.step(model.loss(frames[rows], actions[rows], episodes[rows], model.draw_noise(16, None)))
    right, (error, copying) = open_loops(model, *clumsy_rows(2000, seed=1))
    print(f"right at 1, 5, 10, 15: {right[0]}, {right[4]}, {right[9]}, {right[14]}; mean {np.mean(right)}")
    print(f"squared error {error}, of copying {copying}")
    assert np.mean(right) > 0.8
    assert error < 0.2 * copying


def test_the_judge_counts_frames_that_are_right_to_a_pixel(monkeypatch):
    agent = create_agent("diamond:tiny", Rally().observation_space, Rally().action_space, seed=0)
    imagine = judge_rally.open_loop

    def share():
        right = judge_rally.right_frames(
            agent, lambda seed: make_run_env(EnvConfig(id="examples.rally:Rally"), 1, seed), 3
        )
        assert right.shape == (3, 15)
        return right.mean()

    assert share() < 0.5  # it has learned nothing
    for shift, expected in ((0, 1.0), (2, 0.0)):

        def moved(*given, shift=shift):
            loop = imagine(*given)
            return dataclasses.replace(loop, predicted={"obs": np.roll(loop.truth["obs"], shift, -1)})

        monkeypatch.setattr(judge_rally, "open_loop", moved)
        assert share() == expected
