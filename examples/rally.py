"""Rally: keep a bouncing ball in the air. A small task to judge an imagined future by: a frame alone hides the ball's
direction, moves shift the paddle, hits and misses are rewarded, and a miss ends the episode.

Train it on a CPU: python -m launch.train --config configs/diamond_rally.yaml
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt

SIZE = 16  # pixels, side of the image
BALL = 2  # pixels, side of the ball, which moves one pixel in both directions in a step
PADDLE, SHIFT = 4, 2  # pixels: the paddle's width and its way in a step; it is one pixel high
LAST = SIZE - BALL  # the ball's greatest coordinates
LIMIT = 400  # steps, after which an episode is cut
Image = npt.NDArray[np.uint8]


class Rally(gym.Env[Image, np.int64]):
    """Images [16, 16, 3]: the ball is red, the paddle green, in the last row, on dark blue. Actions: stay, left, right.

    The ball flies diagonally and bounces off the left, the right and the top. When it reaches the last row above the
    paddle, or at most one pixel beside it, the reward is +1 and it flies up; else the reward is -1 and the episode
    ends.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        self.action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._x, self._y = int(self.np_random.integers(0, LAST + 1)), int(self.np_random.integers(0, LAST // 2))
        self._right, self._down = int(self.np_random.choice([-1, 1])), 1
        self._paddle, self._steps = int(self.np_random.integers(0, SIZE - PADDLE + 1)), 0
        return self.render(), {}

    def step(self, action: np.int64) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        way = (0, -SHIFT, SHIFT)[int(action)]
        self._paddle = int(np.clip(self._paddle + way, 0, SIZE - PADDLE))
        if not 0 <= self._x + self._right <= LAST:
            self._right = -self._right
        if self._y + self._down < 0:
            self._down = 1
        self._x, self._y, self._steps = self._x + self._right, self._y + self._down, self._steps + 1
        reward = 0.0
        if self._y == LAST:
            hit = self._paddle - 1 <= self._x and self._x + BALL <= self._paddle + PADDLE + 1
            reward, self._down = (1.0, -1) if hit else (-1.0, 1)
        return self.render(), reward, reward < 0, self._steps >= LIMIT, {}

    def render(self) -> Any:
        image = np.zeros((SIZE, SIZE, 3), np.uint8)
        image[..., 2] = 40
        image[self._y : self._y + BALL, self._x : self._x + BALL, 0] = 255
        image[-1, self._paddle : self._paddle + PADDLE, 1] = 255
        return image


def read_frames(frames: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the ball's column and row and the paddle's column [..., 3] in frames [..., 3, 16, 16] of any scale, even
    blurred ones: where a square of the ball's size is reddest, and a stretch of the paddle's width in the last row is
    greenest.
    """
    windows = np.lib.stride_tricks.sliding_window_view
    red = windows(frames[..., 0, :, :], (BALL, BALL), (-2, -1)).mean((-2, -1))  # [..., 15, 15]
    green = windows(frames[..., 1, -1, :], PADDLE, -1).sum(-1)  # [..., 13]
    row, column = np.divmod(red.reshape(*red.shape[:-2], -1).argmax(-1), red.shape[-1])
    return np.stack([column, row, green.argmax(-1)], -1)
