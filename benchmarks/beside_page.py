"""The page of a comparison with the authors' code: returns.csv, curves.svg and table.md of `benchmarks.beside`."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.calls import read_calls
from worldloom.report.page import OWN, PUBLISHED, axes

OURS, AUTHORS = "ours", "authors"
COLOURS = {OURS: OWN, AUTHORS: PUBLISHED}
REPEAT = 2  # frames that each agent step repeats its action for, as both papers
RETURNS, DONE = "returns.csv", "done.json"


@dataclass(frozen=True)
class Settings:
    """Holds what both sides of a comparison share. batch, length: of DreamerV3's windows; TD-MPC2 has its own."""

    task: str
    steps: int
    threads: int
    train_ratio: float
    batch: int
    length: int


@dataclass(frozen=True)
class Curve:
    """Holds one run's training episodes: agent steps at their ends, and returns. seconds: None while it runs."""

    side: str
    seed: int
    steps: list[int]
    returns: list[float]
    seconds: float | None


def read_curves(out: Path) -> list[Curve]:
    """Read what has been trained so far; a run without an ended episode is left out."""
    curves = []
    for side in (OURS, AUTHORS):
        for folder in sorted(out.glob(f"{side}-*"), key=lambda path: int(path.name.rpartition("-")[2])):
            if not (folder / RETURNS).is_file():
                continue
            with (folder / RETURNS).open() as file:
                rows = [(int(steps), float(value)) for steps, value in csv.reader(file)]
            seconds = json.loads((folder / DONE).read_text())["seconds"] if (folder / DONE).is_file() else None
            if rows:
                steps, returns = (list(column) for column in zip(*rows, strict=True))
                curves.append(Curve(side, int(folder.name.rpartition("-")[2]), steps, returns, seconds))
    return curves


def spread(curves: Sequence[Curve]) -> tuple[Any, Any, Any]:
    """Return steps, and the mean and the sample standard deviation over seeds there: where every run has been."""
    low, high = max(curve.steps[0] for curve in curves), min(curve.steps[-1] for curve in curves)
    steps = np.array(sorted({at for curve in curves for at in curve.steps if low <= at <= high}), float)
    values = np.array([np.interp(steps, curve.steps, curve.returns) for curve in curves])
    return steps, values.mean(0), values.std(0, ddof=1) if len(curves) > 1 else np.zeros_like(steps)


def draw(curves: Sequence[Curve], title: str, path: Path) -> None:
    """Draw each side's mean and standard deviation over seeds, and each seed as a thin line."""
    figure, (axis,) = axes(1, 1, 7.2, 3.6)
    for side in (OURS, AUTHORS):
        same = [curve for curve in curves if curve.side == side]
        if not same:
            continue
        steps, mean, std = spread(same)
        axis.fill_between(steps, mean - std, mean + std, color=COLOURS[side], alpha=0.15, lw=0)
        told = f"mean ± std of {len(same)} seeds" if len(same) > 1 else "one seed"
        axis.plot(steps, mean, color=COLOURS[side], lw=2, label=f"{side}: {told}")
        for curve in same:
            axis.plot(curve.steps, curve.returns, color=COLOURS[side], lw=0.7, alpha=0.7)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("agent steps")
    axis.set_ylabel("return of training episodes")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=9, frameon=False, loc="best")
    figure.savefig(path, metadata={"Date": None})


def averages(curve: Curve, last: int = 5) -> tuple[float, float]:
    """Return the mean return of all episodes, and of the last ones."""
    return float(np.mean(curve.returns)), float(np.mean(curve.returns[-last:]))


HEADER = ("code", "seed", "agent steps", "episodes", "mean return", "mean of the last 5", "minutes")


def table(curves: Sequence[Curve]) -> str:
    """Return the table of all runs, and beneath it how far the sides are apart, beside how far seeds are."""
    lines = [HEADER, ["---"] * len(HEADER)]
    for curve in curves:
        means = [f"{value:.1f}" for value in averages(curve)]
        minutes = f"{curve.seconds / 60:.1f}" if curve.seconds is not None else "not finished"
        counts = [f"{curve.steps[-1]:,}", str(len(curve.returns))]
        lines.append([curve.side, str(curve.seed), *counts, *means, minutes])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    sides = {side: [averages(curve) for curve in curves if curve.side == side] for side in (OURS, AUTHORS)}
    if not all(sides.values()):
        return text
    for place, name in enumerate(("mean return", "mean of the last 5")):
        ours, theirs = ([means[place] for means in sides[side]] for side in (OURS, AUTHORS))
        apart = max(np.ptp(ours), np.ptp(theirs))
        seeds = (
            f"between seeds of one side at most {apart:.1f}" if len(ours + theirs) > 2 else "one seed each says little"
        )
        text += f"\n{name.capitalize()}: ours minus theirs {np.mean(ours) - np.mean(theirs):+.1f}; {seeds}.\n"
    return text


def settings_of(out: Path, asked: Settings) -> Settings:
    """Return the settings that a complete run had; those asked for before there is one."""
    for path in sorted(out.glob(f"*/{DONE}")):
        had = json.loads(path.read_text())["settings"]
        return Settings(**{field.name: had[field.name] for field in dataclasses.fields(Settings)})
    return asked


def write(name: str, settings: Settings, out: Path) -> None:
    """Write returns.csv, curves.svg and table.md."""
    settings = settings_of(out, settings)
    curves = read_curves(out)
    with (out / RETURNS).open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("code", "seed", "agent_steps", "return"))
        for curve in curves:
            points = zip(curve.steps, curve.returns, strict=True)
            rows.writerows((curve.side, curve.seed, at, round(value, 2)) for at, value in points)
    if curves:
        draw(curves, f"{name} on {settings.task}", out / "curves.svg")
    text = f"{name} on {settings.task}, {settings.steps:,} agent steps ({REPEAT * settings.steps:,} frames)."
    calls = "\n".join(f"{call}, {settings.threads} threads." for call in read_calls(out))
    (out / "table.md").write_text(f"{text}\n\n{calls}\n\n{table(curves)}")
