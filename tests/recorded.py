"""Recorded episodes for tests of offline training."""

import gymnasium
import numpy as np


def cartpole_episodes(count, seed=0):
    """CartPole under random actions, in Gymnasium's order, as `ReplayBuffer.add_episode` takes them."""
    env, rng = gymnasium.make("CartPole-v1"), np.random.default_rng(seed)
    return [_episode(env, rng, 10_000 * seed + number) for number in range(count)]


def _episode(env, rng, seed):
    obs, actions, rewards, dones = [env.reset(seed=seed)[0]], [], [], []
    while not dones or not dones[-1]:
        actions.append(int(rng.integers(2)))
        seen, reward, terminated, _, _ = env.step(actions[-1])
        obs.append(seen)
        rewards.append(reward)
        dones.append(terminated)
    return {name: np.array(part) for name, part in
            [("obs", obs), ("actions", actions), ("rewards", rewards), ("dones", dones)]}  # fmt: skip
