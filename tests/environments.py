"""Environments whose right answers are known. Ids: "tests.environments:Counting-v0" and so on."""

import os
import signal
import sys
import time
from typing import ClassVar

import gymnasium as gym
import numpy as np


class Counting(gym.Env):
    """Observation = [step, last action, episode seed % 1000], reward = 10 x step. Ends after `length` steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def __init__(self, length=7, true_end=True, delay=0.0, render_mode=None):
        self.length, self.true_end, self.delay, self.render_mode = length, true_end, delay, render_mode

    def _obs(self, action):
        return np.array([self.count, action, self.tag], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.tag = 0, (seed or 0) % 1000
        return self._obs(0.0), {}

    def step(self, action):
        assert action.shape == (1,)
        time.sleep(self.delay)
        self.count += 1
        done = self.count >= self.length
        return self._obs(action[0]), 10.0 * self.count, done and self.true_end, done and not self.true_end, {}


class Faulty(Counting):
    """Raises at every `period`-th step of an instance."""

    def __init__(self, period=50, **kwargs):
        super().__init__(**kwargs)
        self.period, self.calls = period, 0

    def step(self, action):
        self.calls += 1
        if self.calls % self.period == 0:
            raise RuntimeError("the simulator exploded")
        return super().step(action)


class Broken(Counting):
    """Gives one kind of nonsense: "nan", "shape", "reward", "huge", "exit", "interrupt" or "raise"."""

    def __init__(self, kind="nan", **kwargs):
        super().__init__(**kwargs)
        self.kind = kind

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        if self.kind == "raise":
            raise RuntimeError("the simulator exploded")
        if self.kind == "exit":
            sys.exit("no licence")
        if self.kind == "interrupt":
            raise KeyboardInterrupt
        if self.kind == "nan":
            obs[1] = np.nan
        if self.kind == "shape":
            obs = obs[:2]
        if self.kind == "reward":
            reward = float("inf")
        if self.kind == "huge":
            reward = 1e39  # finite, but not in float32
        return obs, reward, terminated, truncated, info


class Picture(gym.Env):
    """Channel-last images [8, 6, 3] filled with the step; discrete actions start at 3."""

    observation_space = gym.spaces.Box(0, 255, (8, 6, 3), np.uint8)
    action_space = gym.spaces.Discrete(4, start=3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.zeros((8, 6, 3), np.uint8), {}

    def step(self, action):
        self.count += 1
        obs = np.full((8, 6, 3), self.count, np.uint8)
        obs[..., 2] = action
        return obs, float(action), False, self.count >= 5, {}


class Screen(gym.Env):
    """Images [64, 64, 3], as bright as the step; two discrete actions. Reward = action; 9 steps."""

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 20}
    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return np.full((64, 64, 3), 20 * self.count, np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.zeros((64, 64, 3), np.uint8), {}

    def step(self, action):
        self.count += 1
        return np.full((64, 64, 3), 20 * self.count, np.uint8), float(action), self.count >= 9, False, {}


def screen(render_mode=None):
    """A factory, as "tests.environments:screen" names it."""
    return Screen(render_mode)


def no_environment():
    return 3


class Mixed(gym.Env):
    """An image, a vector, a class index that is the step, and bools; two choices, of 2 and of 3. 6 steps.

    Reward = 10 x first choice + second choice.
    """

    observation_space = gym.spaces.Dict(
        {
            "camera": gym.spaces.Box(0, 255, (64, 64, 3), np.uint8),
            "state": gym.spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
            "phase": gym.spaces.Discrete(7, start=1),
            "touch": gym.spaces.MultiBinary(2),
        }
    )
    action_space = gym.spaces.MultiDiscrete([2, 3])

    def _obs(self):
        return {
            "camera": np.full((64, 64, 3), 20 * self.count, np.uint8),
            "state": np.full((2, 2), 1.5 * self.count),
            "phase": self.count + 1,
            "touch": np.array([self.count % 2, 1], np.int8),
        }

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self._obs(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.count += 1
        return self._obs(), float(10 * action[0] + action[1]), self.count >= 6, False, {}


def once(name):
    """Whether this is the first call with that name in the directory of $WORLDLOOM_TEST_MARKS, across processes."""
    path = os.path.join(os.environ["WORLDLOOM_TEST_MARKS"], name)
    if os.path.exists(path):
        return False
    open(path, "w").close()
    return True


class Suicidal(Counting):
    """Kills its own process at its 40th step, once."""

    calls = 0

    def step(self, action):
        self.calls += 1
        if self.calls == 40 and once("suicidal"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class Killer(Counting):
    """Kills every process in which it takes 20 steps."""

    calls = 0

    def step(self, action):
        self.calls += 1
        if self.calls == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class Hanging(Counting):
    """Hangs at its 40th step, once."""

    calls = 0

    def step(self, action):
        self.calls += 1
        if self.calls == 40 and once("hanging"):
            time.sleep(10_000)
        return super().step(action)


class OftenHanging(Counting):
    """Hangs at every 60th step."""

    calls = 0

    def step(self, action):
        self.calls += 1
        if self.calls == 60:
            time.sleep(10_000)
        return super().step(action)


class SlowToBuild(Counting):
    """Takes two seconds to build."""

    def __init__(self):
        time.sleep(2.0)
        super().__init__()


class Target(gym.Env):
    """Copy the observation: reward 1 - |action - observation| each step; 20 steps. Random acting gives about 6.7."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def _obs(self):
        self.target = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.target

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self._obs(), {}

    def step(self, action):
        self.count += 1
        reward = 1 - float(np.abs(action - self.target)[0])
        return self._obs(), reward, False, self.count >= 20, {}


class Doors(gym.Env):
    """Images [16, 16, 3] of a walker between two doors, two steps from each: +1 at the lit one, -1 at the other.

    The reward comes at the door alone, so one step's reward does not tell the right action at the start.
    """

    observation_space = gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps, self.lit = 2, 0, int(self.np_random.integers(2))
        return self.image(), {}

    def step(self, action):
        self.place, self.steps = self.place + 2 * int(action) - 1, self.steps + 1
        arrived = self.place in (0, 4)
        reward = (1.0 if (self.place == 4) == (self.lit == 1) else -1.0) if arrived else 0.0
        return self.image(), reward, arrived, self.steps == 8, {}

    def image(self):
        image = np.zeros((16, 16, 3), np.uint8)
        image[:5, 8 * self.lit : 8 * self.lit + 8, 0] = 255
        image[8:, 3 * self.place : 3 * self.place + 4, 1:] = 255
        return image


class AlwaysFaulty(Faulty):
    """Raises at every second step."""

    def __init__(self):
        super().__init__(period=2)


class AlwaysInterrupting(Counting):
    """Raises KeyboardInterrupt at every second step, as a simulator may that the user never interrupted."""

    def step(self, action):
        if self.count:
            raise KeyboardInterrupt
        return super().step(action)


class SlowCounting(Counting):
    """A step takes 2 ms."""

    def __init__(self):
        super().__init__(delay=0.002)


class OneSlowActor(Counting):
    """A step takes 20 ms in the second process that makes one (the first tries it out), 2 ms in all others."""

    of_this_process = None

    def __init__(self):
        if OneSlowActor.of_this_process is None:
            OneSlowActor.of_this_process = 0.02 if not once("tried") and once("slow") else 0.002
        super().__init__(delay=OneSlowActor.of_this_process)


for name, kind in list(globals().items()):
    if isinstance(kind, type) and issubclass(kind, gym.Env) and kind is not gym.Env:
        gym.register(f"{name}-v0", entry_point=kind)
