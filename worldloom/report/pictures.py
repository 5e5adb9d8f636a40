"""Pictures of what a world model imagines: films of images or of rewards, plots of rewards and vectors."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from worldloom.imagination import OBSERVED, OpenLoop, open_loop
from worldloom.types import Array, WorldModel, is_image, join_obs

TRUE, PREDICTED = "#222222", "#2a6fdb"
SEEN_FRAME, IMAGINED_FRAME = (0.15, 0.6, 0.3), (0.16, 0.44, 0.86)  # border of a film's prediction
WHITE = (1.0, 1.0, 1.0)
NO_DECODER = "This model has no decoder: it predicts rewards, not observations."
MOST_NUMBERS = 6  # entries of vectors that a plot shows
STRIP_COLUMNS = 12
FILM_SIDE = 144  # screen pixels, the least height of a film's images
PICTURE_ROWS = 50  # of a sequence from replay


class Drawn(NamedTuple):
    """Holds what a run shows of an imagination, uint8: a picture [H, W, 3]; of predicted images a film [T, H, W, 3]."""

    picture: Array
    film: Array | None


def image_keys(loop: OpenLoop) -> list[str]:
    """Return the keys of observations that can be shown as images next to their prediction."""
    return [key for key, value in loop.predicted.items() if is_image(value.shape[1:])]


def can_draw() -> bool:
    """Return True if the libraries that pictures need are installed; they come with worldloom[training]."""
    return all(find_spec(name) for name in ("matplotlib", "imageio"))


def show_sequence(model: WorldModel, sequence: Mapping[str, Array] | None, title: str) -> Drawn | None:
    """Draw one sequence from `ReplayBuffer.draw_sequence`, and film the first of its images that are predicted.

    Returns None if there is no sequence, or if the libraries for pictures are missing."""
    if sequence is None or not can_draw():
        return None
    rows = {name: np.array(value) for name, value in sequence.items()}  # what Ray hands over is read-only
    observed = min(OBSERVED, len(rows["actions"]) - 1)
    loop = open_loop(model, join_obs(rows), rows["actions"], rows["rewards"], observed)
    keys = image_keys(loop)
    return Drawn(plot(loop, title), film(loop, keys[0]) if keys else None)


def film(loop: OpenLoop, key: str, scale: int | None = None) -> Array:
    """Return frames [T, H, W, 3] uint8: truth, prediction and their absolute error side by side. The border of the
    prediction is green while the model sees the truth, blue while it imagines.

    scale: screen pixels per pixel, by default 3, and more for images that would be less than FILM_SIDE high.
    """
    truth, predicted = _rgb(loop.truth[key]), _rgb(loop.predicted[key])
    frames = []
    for t, (true, guess) in enumerate(zip(truth, predicted, strict=True)):
        colour = SEEN_FRAME if t < loop.observed else IMAGINED_FRAME
        parts = [_framed(true, WHITE), _framed(guess, colour), _framed(np.abs(true - guess), WHITE)]
        frames.append(np.concatenate(parts, 1))
    scale = scale or max(3, -(-FILM_SIDE // truth.shape[1]))
    return _bytes(np.stack(frames).repeat(scale, 1).repeat(scale, 2))


def reward_film(loop: OpenLoop, title: str = "") -> Array:
    """Return frames [T, H, W, 3] uint8 for a model without a decoder: the true images, if observations are images, and
    rewards, true and predicted, up to each step."""
    from matplotlib.figure import Figure

    shown = {key: _rgb(value) for key, value in loop.truth.items() if is_image(value.shape[1:])}
    both = np.concatenate([loop.true_rewards, loop.predicted_rewards])
    room = 0.1 * max(both.max() - both.min(), 0.1)
    frames = []
    for t in range(loop.steps):
        figure = Figure(figsize=(6 + 2 * len(shown), 2.6), dpi=100, layout="constrained")
        axes = figure.subplots(1, len(shown) + 1, width_ratios=[1] * len(shown) + [3], squeeze=False)[0]
        for axis, (key, images) in zip(axes, shown.items(), strict=False):
            axis.imshow(images[t], interpolation="nearest")
            axis.set_title("true" if key == "obs" else f"{key}, true", fontsize=9)
            axis.set_axis_off()
        until = max(t + 1 - loop.observed, 0)
        _show_rewards(axes[-1], loop, until)
        axes[-1].set_ylim(both.min() - room, both.max() + room)
        axes[-1].set_xlabel(f"step {t}: {'seen' if t < loop.observed else 'imagined'}", fontsize=9)
        axes[-1].legend(loc="upper left", fontsize=8, frameon=False)
        figure.suptitle(f"{title}. {NO_DECODER}" if title else NO_DECODER, fontsize=9, x=0.01, ha="left")
        frames.append(_pixels(figure))
    return np.stack(frames)


def _show_rewards(axis: Any, loop: OpenLoop, until: int) -> None:
    """Draw the rewards of the first `until` imagined steps on an axis for all steps."""
    steps = np.arange(loop.observed, loop.observed + until)
    axis.axvspan(-0.5, loop.observed - 0.5, color="#e8f3ec", lw=0)
    axis.plot(steps, loop.true_rewards[:until], color=TRUE, lw=1.6, label=f"true {loop.reward}")
    axis.plot(steps, loop.predicted_rewards[:until], color=PREDICTED, lw=1.6, ls="--", label="predicted")
    axis.set_xlim(-0.5, loop.steps - 0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _pixels(figure: Any) -> Array:
    """Return a figure as [H, W, 3] uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def strip(loop: OpenLoop, key: str) -> tuple[Array, list[int]]:
    """Return ([3 H, n W, 3] floats, the n steps): truth above prediction above error, at steps spread over the loop."""
    steps = np.unique(np.linspace(0, loop.steps - 1, STRIP_COLUMNS).round().astype(int))
    truth, predicted = _rgb(loop.truth[key])[steps], _rgb(loop.predicted[key])[steps]
    rows = [[_framed(image, WHITE) for image in row] for row in (truth, predicted, np.abs(truth - predicted))]
    return np.concatenate([np.concatenate(row, 1) for row in rows], 0), steps.tolist()


def plot(loop: OpenLoop, title: str = "") -> Array:
    """Draw [H, W, 3] uint8: image strips, then rewards, then entries of vectors, true and predicted over the steps.

    A model without a decoder predicts rewards alone; a sentence says so.
    """
    return _pixels(figure_of(loop, title))


def figure_of(loop: OpenLoop, title: str = "") -> Any:
    """Return the matplotlib Figure that `plot` draws."""
    from matplotlib.figure import Figure

    images = image_keys(loop)
    lines = [(loop.reward, np.arange(loop.observed, loop.steps), loop.true_rewards, loop.predicted_rewards)]
    lines += [(label, np.arange(loop.steps), true, guess) for label, true, guess in _numbers(loop)]
    heights = [2.6] * len(images) + [1.5] * len(lines)
    figure = Figure(figsize=(9, sum(heights) + 0.5 + 0.4 * bool(title)), dpi=100, layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, key in zip(axes, images, strict=False):
        _show_strip(axis, loop, key)
    for axis, (label, steps, true, guess) in zip(axes[len(images) :], lines, strict=True):
        axis.axvspan(-0.5, loop.observed - 0.5, color="#e8f3ec", lw=0)
        point = "o" if len(steps) == 1 else None  # a line of one point would not be seen
        axis.plot(steps, true, color=TRUE, lw=1.6, marker=point, label="true")
        axis.plot(steps, guess, color=PREDICTED, lw=1.6, ls="--", marker=point, fillstyle="none", label="predicted")
        axis.set_xlim(-0.5, loop.steps - 0.5)
        low, high = axis.get_ylim()
        room = max(0.1 * max(abs(low), abs(high), 0.1) - (high - low), 0) / 2  # do not magnify rounding errors
        axis.set_ylim(low - room, high + room)
        axis.set_ylabel(label, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[len(images)].legend(loc="upper right", ncols=2, fontsize=8, frameon=False, bbox_to_anchor=(1, 1.25))
    if not loop.predicted:
        axes[0].set_title(NO_DECODER, fontsize=9, loc="left")
    axes[-1].set_xlabel(f"step; the first {loop.observed} are observed, the rest imagined under the true actions")
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def _show_strip(axis: Any, loop: OpenLoop, key: str) -> None:
    picture, steps = strip(loop, key)
    height, width = picture.shape[0] / 3, picture.shape[1] / len(steps)
    axis.imshow(picture, interpolation="nearest", aspect="equal")
    axis.set_yticks([height / 2, 1.5 * height, 2.5 * height], ["true", "predicted", "error"], fontsize=9)
    axis.set_xticks([(i + 0.5) * width for i in range(len(steps))], steps, fontsize=8)
    axis.axvline(sum(step < loop.observed for step in steps) * width - 0.5, color=PREDICTED, lw=2)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(key if key != "obs" else "", fontsize=9, loc="left")


def _numbers(loop: OpenLoop) -> list[tuple[str, Array, Array]]:
    """Return (label, true, predicted) of the entries of vectors and class indices, at most MOST_NUMBERS."""
    found = []
    for key, guess in loop.predicted.items():
        if is_image(guess.shape[1:]):
            continue
        true, flat = loop.truth[key].reshape(loop.steps, -1), guess.reshape(loop.steps, -1)
        many = flat.shape[1] > 1
        found += [(f"{key}[{i}]" if many else key, true[:, i], flat[:, i]) for i in range(flat.shape[1])]
    return found[:MOST_NUMBERS]


def _rgb(images: Array) -> Array:
    """Convert images [T, C, H, W] to [T, H, W, 3] in [0, 1]: the last frame of a stack; grey stays grey."""
    channels = images[:, -3:] if images.shape[1] % 3 == 0 else images[:, -1:].repeat(3, 1)
    return channels.transpose(0, 2, 3, 1).clip(0, 1)


def _framed(image: Array, colour: tuple[float, ...]) -> Array:
    framed = np.empty((image.shape[0] + 2, image.shape[1] + 2, 3), np.float32)
    framed[:] = colour
    framed[1:-1, 1:-1] = image
    return framed


def _bytes(image: Array) -> Array:
    return (image.clip(0, 1) * 255).round().astype(np.uint8)
