"""A Gymnasium environment in the form that agents expect: actions in [-1, 1] or one-hot, images channel-first."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np

from worldloom.spaces import ActionCodec, ObservationCodec
from worldloom.types import Array, ObsArray

LARGEST = float(np.finfo(np.float32).max)  # of rewards, which replay keeps as float32


class Environment:
    """Wraps one Gymnasium environment; actions are [A], observations [*obs_shape] or a mapping of them.

    observation_space: images uint8 (C, H, W), vectors float32, class indices; or a Dict of these. action_space: Box in
    [-1, 1] of shape (A,), or Discrete and MultiDiscrete, whose actions are given one-hot (see `worldloom.spaces`).
    marks_lives: whether `life_lost` is set after each step, from the entry of that name in its info.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        action_repeat: int = 1,
        episode_length: int | None = None,
        frame_stack: int = 1,
        image_size: int | None = None,
        marks_lives: bool = False,
    ) -> None:
        if action_repeat < 1:
            raise ValueError(f"env.action_repeat is {action_repeat}, expected at least 1.")
        self._env, self._repeat = env, action_repeat
        self.marks_lives, self.life_lost = marks_lives, False
        self.name = env.spec.id if env.spec else type(env.unwrapped).__name__
        self._actions = ActionCodec(self.name, env.action_space)
        self._observations = ObservationCodec(self.name, env.observation_space, frame_stack, image_size)
        self.action_dim, self.action_classes = self._actions.size, self._actions.classes
        self.action_space, self.observation_space = self._actions.space, self._observations.space
        limit = env.spec.max_episode_steps if env.spec else None
        steps = None if limit is None else math.ceil(limit / action_repeat)
        self.episode_length = episode_length or steps  # in agent steps, None where there is no limit

    def reset(self, seed: int | None = None) -> ObsArray:
        obs, _ = self._env.reset(seed=seed)
        return self._observations(obs, first=True)

    def step(self, action: Array) -> tuple[ObsArray, float, bool, bool]:
        """Repeat `action` [A] and sum the rewards; return (obs, reward, terminated, truncated)."""
        native, total, terminated, truncated = self._actions.native(action), 0.0, False, False
        for _ in range(self._repeat):
            obs, reward, terminated, truncated, info = self._env.step(native)
            total += float(reward)
            if terminated or truncated:
                break
        if not abs(total) <= LARGEST:  # NaN is not
            raise ValueError(f"{self.name} gave reward {total}, expected a finite number. Check its reward function.")
        self.life_lost = self.marks_lives and bool(info["life_lost"])
        return self._observations(obs), total, bool(terminated), bool(truncated)

    def step_once(self) -> None:
        """Reset and take one step with the middle action, so that a broken environment fails before a run starts."""
        self.reset(seed=0)
        middle = np.zeros(self.action_dim, np.float32)
        self.step(middle)

    def render(self) -> Array:
        """Return an RGB frame [H, W, 3] uint8; needs make_env(..., render_mode="rgb_array").

        Raises ValueError if the environment gives no such frame.
        """
        try:
            frame = np.asarray(self._env.render())
        except NotImplementedError:
            frame = np.asarray(None)
        if frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(
                f"{self.name} renders no frames. Let its class or factory take render_mode='rgb_array', and render() "
                "return an image [height, width, 3]."
            )
        return frame

    @property
    def frames_per_second(self) -> float:
        """Agent steps per second in the environment's own time; 30 frames per second if it gives no rate."""
        return float(self._env.metadata.get("render_fps") or 30) / self._repeat

    def close(self) -> None:
        self._env.close()
