"""Suites that need more than gymnasium.make: Atari and DeepMind Control."""

from __future__ import annotations

import ctypes.util
import os
import re
import sys
from collections import deque
from dataclasses import dataclass, replace
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces

from worldloom.spaces import resize_image
from worldloom.types import Array

DM_CONTROL_STEPS = 1000  # the time limit of every task of the suite


def paper_name(env_id: str) -> str:
    """Return the name that papers give to a task: cup-catch for dm_control/ball_in_cup-catch-v0."""
    name = re.sub(r"^.*/|-v\d+$", "", env_id)
    return name.replace("ball_in_cup", "cup").replace("_", "-") if env_id.startswith("dm_control/") else name


@dataclass(frozen=True, kw_only=True)
class AtariConfig:
    """Atari frames and actions; the defaults are those of Atari100k (DreamerV3).

    Args:
        image_size: side of the square image
        grayscale: one channel instead of three
        resize: bilinear (with antialiasing), or area, the mean of the pixels that a new one covers
        sticky: probability that a frame repeats the previous action
        noops: largest number of no-ops after a reset; the number is drawn at random
        least_noops: smallest number of no-ops after a reset
        full_actions: all 18 actions instead of those that have an effect in the game
        max_frames: frames after which an episode is cut
        life_loss: in training, a lost life ends an episode, and the next one goes on with the same game (end), is told
            to an agent that learns from it, within one episode (mark), or is nothing of its own (ignore); evaluations
            play whole games
        same_seed: in training, start every game of an environment from one seed, until it is made again
    """

    image_size: int = 64
    grayscale: bool = False
    resize: Literal["bilinear", "area"] = "bilinear"
    sticky: float = 0.0
    noops: int = 30
    least_noops: int = 0
    full_actions: bool = False
    max_frames: int = 108_000
    life_loss: Literal["ignore", "mark", "end"] = "ignore"
    same_seed: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.sticky < 1:
            raise ValueError(f"env.atari.sticky is {self.sticky}, expected a probability in [0, 1).")
        if self.image_size < 1 or self.noops < 0:
            raise ValueError(f"env.atari: image_size={self.image_size}, noops={self.noops}, expected at least 1 and 0.")
        if not 0 <= self.least_noops <= self.noops:
            allowed = f"from 0 to env.atari.noops={self.noops}"
            raise ValueError(f"env.atari.least_noops is {self.least_noops}, expected a number {allowed}.")
        if self.max_frames < 1:
            raise ValueError(f"env.atari.max_frames is {self.max_frames}, expected at least 1.")

    def for_evaluation(self) -> AtariConfig:
        """Return these settings for whole games that start from seeds of their own."""
        return replace(self, life_loss="ignore", same_seed=False)


@dataclass(frozen=True, kw_only=True)
class DMCConfig:
    """Observations of DeepMind Control.

    Args:
        observations: states (one vector), pixels (an image), or both (a mapping of the states by name and the image)
        image_size: side of the square image
        camera: number of the camera; null takes 0, or 2 for quadrupeds
    """

    observations: Literal["states", "pixels", "both"] = "states"
    image_size: int = 64
    camera: int | None = None

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"env.dmc.image_size is {self.image_size}, expected at least 1.")


class Atari(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Repeats actions, takes the pixel-wise maximum of the last two frames, resizes it; starts with random no-ops.

    The two frames never come from different games. `terminated` is the game's own end; the frame limit truncates. A
    life counts as lost at the end of the step in which that happened: `info["life_lost"]`. Where it ends the episode,
    the next `reset` changes nothing and gives the same image again, whatever its seed.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], config: AtariConfig, repeat: int) -> None:
        super().__init__(env)
        self._config, self._repeat = config, repeat
        self._frames: deque[Array] = deque(maxlen=2)
        self._count = self._lives = 0
        self._goes_on = False  # whether the game does, although its episode ended
        self._seed: int | None = None
        side, channels = config.image_size, 1 if config.grayscale else 3
        self.observation_space = spaces.Box(0, 255, (channels, side, side), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        if self._goes_on:
            self._goes_on = False
            return self._image(), {}
        if self._config.same_seed:
            seed = self._seed = seed if self._seed is None else self._seed
        frame, info = self.env.reset(seed=seed, options=options)
        self._frames.clear()
        self._frames.append(frame)
        self._count = 0
        for _ in range(int(self.np_random.integers(self._config.least_noops, self._config.noops + 1))):
            frame, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                frame, info = self.env.reset()
            self._frames.clear()
            self._frames.append(frame)
        self._lives = int(info.get("lives", 0))
        return self._image(), info

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        total, terminated, truncated = 0.0, False, False
        info: dict[str, Any] = {}
        for _ in range(self._repeat):
            frame, reward, terminated, truncated, info = self.env.step(action)
            self._frames.append(frame)
            self._count += 1
            total += float(reward)
            truncated = truncated or self._count >= self._config.max_frames
            if terminated or truncated:
                break
        lives = int(info.get("lives", 0))
        lost, self._lives = lives < self._lives, lives
        if lost and self._config.life_loss == "end":
            self._goes_on, terminated = not terminated and not truncated, True
        return self._image(), total, bool(terminated), bool(truncated and not terminated), {**info, "life_lost": lost}

    def _image(self) -> Array:
        """Return the image [C, side, side] uint8."""
        frame = np.maximum.reduce(list(self._frames))
        planes = np.moveaxis(frame if frame.ndim == 3 else frame[..., None], -1, 0)
        return resize_image(np.ascontiguousarray(planes), self._config.image_size, self._config.resize == "area")


def make_atari(
    env_id: str, config: AtariConfig, action_repeat: int, render_mode: str | None = None
) -> gymnasium.Env[Any, Any]:
    """Make an "ALE/…-v5" game with these settings alone: the id's own frame skip and stickiness are switched off."""
    import ale_py

    gymnasium.register_envs(ale_py)
    game = gymnasium.make(
        env_id,
        disable_env_checker=True,
        obs_type="grayscale" if config.grayscale else "rgb",
        frameskip=1,
        repeat_action_probability=config.sticky,
        full_action_space=config.full_actions,
        render_mode=render_mode,
    )
    return Atari(game, config, action_repeat)


class States(gymnasium.ObservationWrapper[Array, Any, Any]):
    """The states of a dm_control task as one vector [V], in dm_control's order, which published checkpoints expect.

    Gymnasium sorts the entries of a Dict space by name: flattening it would put walker's height before its
    orientations.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        task: Any = env.unwrapped
        self._names = list(task._env.observation_spec())  # where shimmy keeps the dm_control task
        spaces: Any = env.observation_space
        size = sum(int(np.prod(spaces[name].shape)) for name in self._names)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def observation(self, observation: Any) -> Array:
        return np.concatenate([np.ravel(observation[name]) for name in self._names]).astype(np.float32)


def make_dm_control(env_id: str, config: DMCConfig, render_mode: str | None = None) -> gymnasium.Env[Any, Any]:
    """Make a "dm_control/…-v0" task; its states are one vector in dm_control's order."""
    _render_without_display()
    import dm_control  # noqa: F401 - without it, shimmy registers nothing and says nothing
    import shimmy  # noqa: F401 - registers the ids

    if config.observations == "states":
        options: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
        return States(gymnasium.make(env_id, disable_env_checker=True, **options))
    camera = config.camera if config.camera is not None else 2 if "quadruped" in env_id else 0
    view = {"height": config.image_size, "width": config.image_size, "camera_id": camera}
    task = gymnasium.make(env_id, disable_env_checker=True, render_mode="rgb_array", render_kwargs=view)
    return gymnasium.wrappers.AddRenderObservation(task, config.observations == "pixels", render_key="image")


def _render_without_display() -> None:
    """Let MuJoCo render through EGL if there is no display. MuJoCo reads the variable when it is first imported."""
    if sys.platform == "linux" and "DISPLAY" not in os.environ and ctypes.util.find_library("EGL"):
        os.environ.setdefault("MUJOCO_GL", "egl")
