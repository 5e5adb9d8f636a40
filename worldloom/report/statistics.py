"""Means over seeds and tasks, with bootstrap intervals (Agarwal et al. 2021, "Deep RL at the edge of the statistical
precipice")."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from worldloom.types import Array

LEVEL = 0.95
RESAMPLES = 2000


def mean_interval(values: Array, resamples: int = RESAMPLES) -> tuple[Array, Array, Array]:
    """Return the mean over seeds and the ends of its 95 % percentile bootstrap interval.

    values: [seeds, ...]. With one seed, both ends are its value.
    """
    draws = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = _ends(values[draws].mean(1))
    return values.mean(0), low, high


def iqm(values: Array) -> Array:
    """Return the interquartile mean along the last axis: the mean without the lowest and the highest quarter.

    As in rliable, the number cut off at each side is rounded down.
    """
    cut = values.shape[-1] // 4
    kept: Array = np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut]
    mean: Array = kept.mean(-1)
    return mean


def iqm_interval(tasks: Sequence[Array], resamples: int = RESAMPLES) -> tuple[float, float, float]:
    """Return the IQM over all scores of all tasks, and the ends of its 95 % interval.

    tasks: the scores [seeds] of each task. The bootstrap is stratified: it draws seeds anew within each task.
    """
    draw = np.random.default_rng(0).integers
    drawn = [scores[draw(len(scores), size=(resamples, len(scores)))] for scores in tasks]
    low, high = _ends(iqm(np.concatenate(drawn, axis=1)))
    return float(iqm(np.concatenate(tasks))), float(low), float(high)


def _ends(statistic: Array) -> tuple[Array, Array]:
    low, high = np.quantile(statistic, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def on_one_axis(curves: Sequence[tuple[Array, Array]], points: int = 200) -> tuple[Array, Array]:
    """Interpolate curves (x, y) on one axis: return x [points], and y [curves, points] with NaN beyond a curve's ends.

    The axis holds every x of the curves if they are not more than `points`.
    """
    known = np.unique(np.concatenate([x for x, _ in curves]))
    axis = known if len(known) <= points else np.linspace(known[0], known[-1], points)
    rows = [np.interp(axis, x, y, left=np.nan, right=np.nan) for x, y in curves]
    return axis, np.stack(rows)


def over_curves(
    rows: Array, statistic: Callable[[Array], tuple[Array, Array, Array]] = mean_interval
) -> tuple[Array, Array, Array]:
    """Apply `statistic` at each point to the curves that reach it. rows: [curves, points], as `on_one_axis` returns."""
    found = np.full((3, rows.shape[1]), np.nan)
    reached = ~np.isnan(rows)
    for pattern in np.unique(reached, axis=1).T:
        if pattern.any():
            here = (reached == pattern[:, None]).all(0)
            found[:, here] = statistic(rows[pattern][:, here])
    return found[0], found[1], found[2]
