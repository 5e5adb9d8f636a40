"""Catch: a ball falls, a paddle below must be there. A small task to learn from images.

Train it on two CPU cores: python -m launch.train --config configs/dreamerv3_catch.yaml
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt

BALL, FALL, SHIFT = 8, 4, 8  # pixels: the ball's side, its fall in a step, the paddle's way in a step
PADDLE, THICK = 12, 4  # pixels: the paddle's width and height
BALLS = 5  # in an episode


class Catch(gym.Env[npt.NDArray[np.uint8], np.int64]):
    """Images [size, size, 3]; actions left, stay, right; +1 for each ball that is caught, -1 for one that is missed.

    size: pixels, a multiple of 16. colours: draw the colours of ball, paddle and background anew in each episode.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, size: int = 48, colours: bool = False, render_mode: str | None = None) -> None:
        self.size, self.colours, self.render_mode = size, colours, render_mode
        self.observation_space = gym.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        drawn = (
            self.np_random.integers(0, 256, (3, 3)) if self.colours else [[240, 220, 70], [80, 200, 240], [25, 30, 45]]
        )
        self._ball_colour, self._paddle_colour, self._background = np.array(drawn, np.uint8)
        self._paddle, self._balls = (self.size - PADDLE) // 2, 0
        self._drop()
        return self.render(), {}

    def _drop(self) -> None:
        self._x, self._y = int(self.np_random.integers(0, self.size - BALL + 1)), 0

    def step(self, action: np.int64) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._paddle = int(np.clip(self._paddle + SHIFT * (int(action) - 1), 0, self.size - PADDLE))
        self._y += FALL
        reward = 0.0
        if self._y + BALL >= self.size - THICK:
            caught = self._paddle < self._x + BALL and self._x < self._paddle + PADDLE  # they touch
            reward = 1.0 if caught else -1.0
            self._balls += 1
            self._drop()
        return self.render(), reward, self._balls == BALLS, False, {}

    def render(self) -> Any:
        image = np.empty((self.size, self.size, 3), np.uint8)
        image[:] = self._background
        image[self.size - THICK :, self._paddle : self._paddle + PADDLE] = self._paddle_colour
        image[self._y : self._y + BALL, self._x : self._x + BALL] = self._ball_colour
        return image


def hard(render_mode: str | None = None) -> Catch:
    """Make the harder variant: 64 x 64 pixels, colours drawn anew in each episode."""
    return Catch(64, True, render_mode)
