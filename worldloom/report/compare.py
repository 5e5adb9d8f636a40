"""A page that compares runs: curves and final returns over seeds and tasks, with intervals, and what was configured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.report.compared import (
    EVALUATION,
    SEED,
    TRAINING,
    ComparedRun,
    Groups,
    differences,
    grouped,
    normalised,
    read_compared,
    shown_value,
)
from worldloom.report.page import PUBLISHED, SOFT, Page, Section, Table, axes, duration, svg
from worldloom.report.published import Curve, published_curve
from worldloom.report.statistics import iqm_interval, mean_interval, on_one_axis, over_curves
from worldloom.types import Array

COLOURS = ("#2a6fdb", "#1f9d6b", "#8b4fc6", "#d0407e", "#0f8ea8", "#9a7b12", "#5b6675", "#b5403a")
MANY = 6  # runs whose names a table still lists


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write one HTML page about runs; folders: their directories, or folders of them such as a sweep's.

    Needs matplotlib and jinja2. Raises FileNotFoundError or ValueError if there is nothing to compare.
    """
    runs = read_compared(folders)
    groups = grouped(runs)
    colours = _colours(groups)
    metric = _metric(runs)
    sections = [_curves(task, variants, metric, colours) for task, variants in groups.items()]
    if (across := _across_tasks(groups, colours)) is not None:
        sections.insert(0, across)
    page = Page(
        title=_title(runs, groups),
        verdict=_verdict(runs),
        tiles=_tiles(runs, groups),
        sections=sections,
        tables=[_final_table(groups), _differences_table(runs), _runs_table(runs)],
        details=[("configuration of the first run, complete", _settings(runs[0]))],
    )
    return page.write(out)


def _colours(groups: Groups) -> dict[str, str]:
    variants = dict.fromkeys(variant for same in groups.values() for variant in same)
    return {variant: COLOURS[i % len(COLOURS)] for i, variant in enumerate(variants)}


def _metric(runs: Sequence[ComparedRun]) -> str:
    """Return the metric of the curves: evaluations if every run has two, else returns of training."""
    evaluated = all(sum(EVALUATION in line for line in run.lines) >= 2 for run in runs)
    return EVALUATION if evaluated else TRAINING


def _title(runs: Sequence[ComparedRun], groups: Groups) -> str:
    algorithms = sorted({run.subject.algorithm for run in runs})
    tasks = list(groups)
    where = ", ".join(tasks) if len(tasks) <= 3 else f"{len(tasks)} tasks"
    return f"{' and '.join(algorithms) if len(algorithms) <= 3 else f'{len(algorithms)} algorithms'} on {where}"


def _verdict(runs: Sequence[ComparedRun]) -> str:
    open_runs = [run.name for run in runs if run.status != "completed"]
    if not open_runs:
        return f"A comparison of {len(runs)} runs. All are complete."
    named = ", ".join(open_runs[:MANY]) + (" …" if len(open_runs) > MANY else "")
    return f"A comparison of {len(runs)} runs. Not complete: {named}."


def _tiles(runs: Sequence[ComparedRun], groups: Groups) -> list[tuple[str, str]]:
    return [
        ("runs", f"{len(runs)}"),
        ("tasks", f"{len(groups)}"),
        ("variants", f"{len(_colours(groups))}"),
        ("seeds", f"{len({run.subject.seed for run in runs})}"),
        ("environment steps, together", f"{sum(run.env_steps for run in runs):,}"),
        ("wall time, together", duration(sum(run.wall_seconds for run in runs))),
    ]


def _curves(task: str, variants: Mapping[str, list[ComparedRun]], metric: str, colours: Mapping[str, str]) -> Section:
    """Draw returns over frames and over wall-clock time, each with the mean and its interval over seeds."""
    figure, (by_frames, by_time) = axes(1, 2, 9.6, 3.4)
    slowest = max(run.wall_seconds for runs in variants.values() for run in runs)
    units = (("hours", 3600), ("minutes", 60), ("seconds", 1))
    unit, seconds = next((each for each in units if slowest >= each[1] * 2), units[-1])
    for variant, runs in variants.items():
        label = f"{variant} ({len(runs)} {'seed' if len(runs) == 1 else 'seeds'})"
        _draw(by_frames, [run.curve(metric, "frames") for run in runs], 1, colours[variant], label)
        _draw(by_time, [run.curve(metric, "seconds") for run in runs], seconds, colours[variant], label)
    known = [curve for curve in map(_published, _first_of_algorithms(variants)) if curve is not None]
    reached = 1.25 * max(run.env_steps * run.subject.action_repeat for runs in variants.values() for run in runs)
    for curve in known:
        _draw_published(by_frames, curve, reached)
    by_frames.set_xlabel("frames", fontsize=9, color=SOFT)
    by_time.set_xlabel(f"wall-clock time, {unit}", fontsize=9, color=SOFT)
    by_time.sharey(by_frames)
    for axis in (by_frames, by_time):
        axis.set_xlim(left=0)
    if by_frames.get_legend_handles_labels()[0]:
        figure.legend(
            *by_frames.get_legend_handles_labels(), fontsize=9, frameon=False, loc="outside lower left", ncols=2
        )
    what = "evaluation" if metric == EVALUATION else "training (mean of the last 20 episodes)"
    text = (
        f"Return in {what}: mean over seeds and its 95 % bootstrap interval. A point averages the runs that reach it."
    )
    text += "" if known else " The authors report no curve for this task."
    return Section(task, text, svg(figure))


def _draw(axis: Any, curves: Sequence[tuple[Array, Array]], unit: float, colour: str, label: str) -> None:
    curves = [(x / unit, y) for x, y in curves if len(x)]
    if not curves:
        return
    x, rows = on_one_axis(curves)
    mean, low, high = over_curves(rows)
    axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    axis.plot(x, mean, color=colour, lw=1.8, marker="o" if len(x) <= 20 else None, ms=3, label=label)


def _first_of_algorithms(variants: Mapping[str, list[ComparedRun]]) -> list[ComparedRun]:
    """Return one run of each algorithm family."""
    runs = [run for same in variants.values() for run in same]
    return list({run.subject.algorithm.partition(":")[0]: run for run in reversed(runs)}.values())


def _published(run: ComparedRun) -> Curve | None:
    try:
        return published_curve(run.subject)
    except (ValueError, ImportError):  # a family of the user's own that is not importable here
        return None


def _draw_published(axis: Any, curve: Curve, reached: float) -> None:
    shown = [i for i, x in enumerate(curve.frames) if x <= reached]
    if len(shown) < 2:
        return
    x, mean, std = (np.array([part[i] for i in shown], float) for part in (curve.frames, curve.mean, curve.std))
    axis.fill_between(x, mean - std, mean + std, color=PUBLISHED, alpha=0.12, lw=0)
    axis.plot(x, mean, color=PUBLISHED, lw=1.6, ls="--", marker="s", ms=3, label=f"{curve.label}, mean ± std")


def _across_tasks(groups: Groups, colours: Mapping[str, str]) -> Section | None:
    """Draw the IQM of each variant over the tasks that all variants have played; None for fewer than two such tasks."""
    scores, scale = normalised(groups)
    if len(scores) < 2:
        return None
    variants = list(next(iter(scores.values())))
    figure, (axis,) = axes(1, 1, 9.6, 0.9 + 0.42 * len(variants))
    lines = []
    for row, variant in enumerate(variants):
        middle, low, high = iqm_interval([task[variant] for task in scores.values()])
        axis.plot([low, high], [row, row], color=colours[variant], lw=7, alpha=0.25, solid_capstyle="butt")
        axis.plot([middle], [row], "o", color=colours[variant], ms=6)
        lines.append(f"{variant}: {middle:.3f} ({low:.3f} to {high:.3f})")
    axis.set_yticks(range(len(variants)), variants)
    axis.set_ylim(len(variants) - 0.5, -0.5)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("IQM of final scores", fontsize=9, color=SOFT)
    text = (
        f"Interquartile mean (IQM) of the final returns in {len(scores)} tasks, over all seeds, with its stratified "
        f"95 % bootstrap interval. {scale} {'; '.join(lines)}."
    )
    return Section("Over tasks", text, svg(figure))


def _final_table(groups: Groups) -> Table:
    rows = []
    for task, variants in groups.items():
        for variant, runs in variants.items():
            scores = np.array([run.final_return for run in runs if run.final_return is not None], float)
            if not len(scores):
                continue
            mean, low, high = mean_interval(scores)
            interval = f"{low:,.1f} to {high:,.1f}" if len(scores) > 1 else ""
            spread = f"{scores.min():,.1f} to {scores.max():,.1f}" if len(scores) > 1 else ""
            wall = duration(float(np.mean([run.wall_seconds for run in runs])))
            rows.append(
                (task, variant, str(len(scores)), f"{mean:,.1f}", interval, spread, _published_at_end(runs), wall)
            )
    header = ("task", "variant", "seeds", "mean", "95 % interval", "lowest to highest", "published", "wall time, mean")
    text = "The return of each run's last evaluation. Published: the authors' mean, where the runs end."
    return Table("Final returns", text, header, rows)


def _published_at_end(runs: Sequence[ComparedRun]) -> str:
    """Return the published mean at the frames where these runs end, if the published curve covers them."""
    curve = _published(runs[0])
    frames = float(np.mean([run.env_steps * run.subject.action_repeat for run in runs]))
    if curve is None or not curve.frames[0] <= frames <= 1.01 * curve.frames[-1]:
        return ""
    return f"{np.interp(frames, curve.frames, curve.mean):,.1f}"


def _differences_table(runs: Sequence[ComparedRun]) -> Table:
    def holders(names: Sequence[str]) -> str:
        return f"{len(names)} runs" if len(names) > MANY else ", ".join(names)

    rows = [
        (field, value, holders(names))
        for field, values in differences(runs).items()
        if field != SEED
        for value, names in values.items()
    ]
    text = "" if rows else "Besides their seeds, all runs have the same configuration."
    return Table("Differences in the configurations", text, ("field", "value", "runs") if rows else (), rows)


def _runs_table(runs: Sequence[ComparedRun]) -> Table:
    def cells(run: ComparedRun) -> tuple[str, ...]:
        final = "" if run.final_return is None else f"{run.final_return:,.1f}"
        task, seed = run.subject.env_id, str(run.subject.seed)
        return run.name, task, seed, final, f"{run.env_steps:,}", duration(run.wall_seconds), run.status

    header = ("run", "task", "seed", "final return", "steps", "wall time", "status")
    return Table("Runs", "", header, [cells(run) for run in runs])


def _settings(run: ComparedRun) -> str:
    return "\n".join(f"{field}: {shown_value(value)}" for field, value in run.fields.items())
