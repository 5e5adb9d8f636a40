"""Learning curves over the authors' published ones: python -m benchmarks.curves --suite dmc12 --algorithm tdmpc2:5m

Trains every task and seed with the published settings of a preset, nothing tuned, several runs at a time as
launch.sweep does: runs that are complete are kept, and one that was interrupted goes on. Tasks and seeds may be added
later. Then it writes, into the folder OUT: compare.html with every curve over the published mean and spread, table.md
with our value, theirs and the difference in their standard deviations, curves.csv and curves.svg. Values are compared
at the last published frame that half of a task's seeds reached. TD-MPC2's authors report evaluations, DreamerV3's the
returns of training. Arguments that it does not know go to the configuration of every run.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.calls import note_call, read_calls
from launch.arguments import run_config, run_parser
from launch.sweep import begun, carry_out
from launch.sweeps.folder import SweepFolder
from launch.sweeps.grid import values_of
from launch.sweeps.plan import Plan
from launch.sweeps.table import last_line
from worldloom.families import resolve
from worldloom.report.compare import write_comparison
from worldloom.report.compared import EVALUATION, TRAINING, ComparedRun, read_compared
from worldloom.report.page import OWN, PUBLISHED, axes
from worldloom.report.page import TRAINING as SOFT_OWN
from worldloom.report.published import Curve, published_curve
from worldloom.runs.build import check_config
from worldloom.runs.config import RunConfig

DMC12 = (
    *("cartpole-swingup", "cartpole-balance_sparse", "ball_in_cup-catch", "reacher-easy", "finger-spin", "walker-walk"),
    *("walker-run", "cheetah-run", "hopper-stand", "quadruped-walk", "pendulum-swingup", "acrobot-swingup"),
)


@dataclass(frozen=True)
class Suite:
    """Tasks by their ids, and the preset of each family."""

    tasks: tuple[str, ...]
    presets: dict[str, str]


SUITES = {
    "dmc12": Suite(
        tuple(f"dm_control/{task}-v0" for task in DMC12),
        {"tdmpc2": "configs/tdmpc2_dmc.yaml", "dreamerv3": "configs/dreamerv3_dmc_proprio.yaml"},
    ),
}
METRICS = {  # what the authors report
    "tdmpc2": EVALUATION,
    "dreamerv3": TRAINING,
}
NAMES = {EVALUATION: "evaluations", TRAINING: "training, last 20 episodes"}
PUBLISHED_EVERY = 50_000  # agent steps between two points of TD-MPC2's published curves


@dataclass(frozen=True)
class Result:
    """One task: its runs, and both values at a frame that both curves have."""

    task: str
    runs: list[ComparedRun]
    published: Curve | None
    metric: str

    @property
    def reached(self) -> int:
        return max(frames(run) for run in self.runs)

    @property
    def values(self) -> tuple[int, list[float]]:
        """The last published frame that half of the seeds reached, and the value there of each that did.

        Without one, the last frame that all have in common.
        """
        curves = [(x, y) for x, y in (run.curve(self.metric, "frames") for run in self.runs) if len(x)]
        ends = sorted(int(x[-1]) for x, _ in curves)
        need = (len(self.runs) + 1) // 2
        half = ends[-need] if len(ends) >= need else 0
        known = [frame for frame in (self.published.frames if self.published else ()) if 0 < frame <= half]
        frame = known[-1] if known else ends[0] if ends else 0
        return frame, [float(np.interp(frame, x, y)) for x, y in curves if x[-1] >= frame]

    def row(self) -> list[str]:
        """Return task, frames, ours, theirs, and the difference in published standard deviations."""
        frame, ours = self.values
        spread = f" ± {np.std(ours, ddof=1):.1f}" if len(ours) > 1 else ""
        shown = f"{np.mean(ours):.1f}{spread}" if ours else self.training_so_far()
        if 0 < len(ours) < len(self.runs):
            shown += f" ({len(ours)} of {len(self.runs)} seeds)"
        theirs, apart = "none reported at these frames", ""
        if self.published and frame in self.published.frames and ours:
            at = self.published.frames.index(frame)
            mean, std = self.published.mean[at], self.published.std[at]
            theirs = f"{mean:.1f} ± {std:.1f}"
            apart = f"{(np.mean(ours) - mean) / std:+.1f}" if std else ""
        seeds = ", ".join(f"{run.subject.seed} ({run.status} at {frames(run):,})" for run in self.runs)
        hours = f"{sum(run.wall_seconds for run in self.runs) / 3600:.1f}"
        return [self.task, seeds, f"{frame:,}", shown, theirs, apart, hours]

    def training_so_far(self) -> str:
        """Return what training episodes returned, in words, where nothing else has been measured yet."""
        curves = [(x, y) for x, y in (run.curve(TRAINING, "frames") for run in self.runs) if len(x)]
        each = ", ".join(f"{y[-1]:.1f} at {int(x[-1]):,}" for x, y in curves)
        return f"none; the last 20 training episodes: {each}" if each else "none"

    @property
    def drawn(self) -> tuple[str, ...]:
        """Return the metrics to draw and note: what the authors report, and the returns of training."""
        return tuple(dict.fromkeys((self.metric, TRAINING)))


HEADER = ("task", "seeds, frames reached", "compared at", "ours", "published", "apart, in their σ", "hours")


def frames(run: ComparedRun) -> int:
    return run.env_steps * run.subject.action_repeat


def read_results(out: Path) -> list[Result]:
    """Read what has been trained so far, task by task."""
    by_task: dict[str, list[ComparedRun]] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):  # no run has metrics yet
        for run in read_compared([out]):
            by_task.setdefault(run.subject.env_id, []).append(run)
    return [Result(task, runs, published_curve(runs[0].subject), metric_of(runs[0])) for task, runs in by_task.items()]


def metric_of(run: ComparedRun) -> str:
    """Return what the authors of a run's family report."""
    return METRICS[resolve(run.subject.algorithm)[0]]


def write(results: Sequence[Result], out: Path) -> None:
    """Write table.md, curves.csv, curves.svg and compare.html."""
    lines = [" | ".join(HEADER), " | ".join("---" for _ in HEADER), *(" | ".join(r.row()) for r in results)]
    table = "".join(f"| {line} |\n" for line in lines)
    failed = [f"{name} failed: {last_line(error)}" for name, error in SweepFolder(out).read_errors().items()]
    calls = "\n".join(f"{call}." for call in read_calls(out))
    (out / "table.md").write_text("\n\n".join([calls, table, *failed]).strip() + "\n")
    if not results:
        return
    write_comparison([out], out / "compare.html")
    with (out / "curves.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("task", "seed", "measured", "frames", "return"))
        for result in results:
            for run, metric in itertools.product(result.runs, result.drawn):
                first = (result.task, run.subject.seed, NAMES[metric])
                table.writerows(
                    (*first, int(x), round(float(y), 2)) for x, y in zip(*run.curve(metric, "frames"), strict=True)
                )
    draw(results, out / "curves.svg")


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw every seed of every task over the published mean and one standard deviation."""
    columns = min(len(results), 4)
    rows = math.ceil(len(results) / columns)
    figure, grid = axes(rows, columns, 3.0 * columns + 0.6, 2.5 * rows)
    places = np.atleast_1d(grid).ravel()
    for place in places[len(results) :]:
        place.set_visible(False)
    for place, result in zip(places, results, strict=False):
        place.set_title(short(result.task), fontsize=10)
        if result.published:
            first = min(
                (x for x in result.published.frames if x > 0), default=0
            )  # what a run that is under way goes towards
            shown = [i for i, x in enumerate(result.published.frames) if x <= max(1.25 * result.reached, first)]
            x, mean, std = (np.array([part[i] for i in shown], float) for part in curve_parts(result.published))
            place.fill_between(x, mean - std, mean + std, color=PUBLISHED, alpha=0.2, lw=0)
            place.plot(x, mean, color=PUBLISHED, lw=1.4, marker="o", ms=3, label=result.published.label)
        for run, metric in itertools.product(result.runs, reversed(result.drawn)):
            x, y = run.curve(metric, "frames")
            marked = "o" if metric == EVALUATION and len(x) < 20 else None
            color = OWN if metric == result.metric else SOFT_OWN
            place.plot(x, y, color=color, lw=1.4, marker=marked, ms=3, label=f"ours: {NAMES[metric]}")
        if place.dataLim.y0 >= 0:  # returns that may be negative keep their own scale
            place.set_ylim(bottom=0)
    handles = dict(zip(*reversed(places[0].get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), fontsize=9, frameon=False, loc="outside lower left", ncols=min(columns, 3)
    )
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def short(task: str) -> str:
    return task.removeprefix("dm_control/").removesuffix("-v0")


def curve_parts(curve: Curve) -> tuple[tuple[float, ...], ...]:
    return curve.frames, curve.mean, curve.std


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="benchmarks.curves", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, default="dmc12")
    parser.add_argument("--algorithm", default="tdmpc2:5m", help="a size of a family with a preset for the suite")
    parser.add_argument("--tasks", help="some of the suite's, comma-separated; parts of their names do")
    parser.add_argument("--steps", type=int, default=50_000, help="agent steps of each run")
    parser.add_argument("--seeds", default="1,2,3", help="comma-separated")
    parser.add_argument("--out", type=Path, help="folder; default: runs/curves-SUITE-FAMILY")
    parser.add_argument("--parallel", type=int, help="runs side by side; default: one for each CPU, four for each GPU")
    parser.add_argument("--table", action="store_true", help="train nothing: write what there is")
    options, more = parser.parse_known_args(argv)
    suite = SUITES[options.suite]
    try:
        family = resolve(options.algorithm)[0]
    except ValueError as error:
        parser.error(str(error))
    if family not in suite.presets:
        parser.error(f"{options.suite} has no preset for {family}, expected one of: {', '.join(suite.presets)}.")
    words = [word.replace("-", "_") for word in (options.tasks or "").split(",") if word or not options.tasks]
    options.tasks = [task for task in suite.tasks if any(word in task.replace("-", "_") for word in words)]
    if not options.tasks:
        parser.error(f"{options.suite} has no such task, expected some of: {', '.join(suite.tasks)}.")
    try:
        options.seeds = [int(seed) for seed in values_of(options.seeds)]
    except ValueError:
        parser.error(f"--seeds is {options.seeds!r}, expected numbers such as 1,2,3 or 1..3.")
    options.family, options.preset = family, suite.presets[family]
    options.out = options.out or Path("runs") / f"curves-{options.suite}-{family}"
    return options, more


def our_config(o: argparse.Namespace, task: str, seed: int, more: Sequence[str]) -> RunConfig:
    evaluates = METRICS[o.family] == EVALUATION
    fields = {
        "--algorithm": o.algorithm,
        "--env.id": task,
        "--train.seed": seed,
        "--train.total_steps": o.steps,
        "--eval.interval": max(min(o.steps // 2, PUBLISHED_EVERY), 1) if evaluates else 0,
        "--runtime.kind": "inline",
    }
    parser = run_parser("benchmarks.curves", "")
    words = ["--config", o.preset, *(str(word) for pair in fields.items() for word in pair), *more]
    config = run_config(parser, parser.parse_args(words))
    check_config(config)
    return config


def train_all(o: argparse.Namespace, argv: Sequence[str], more: Sequence[str]) -> int:
    """Train what is not finished of what is asked for; the folder may hold other runs, too. Return the exit status.

    Raises ValueError if the folder holds runs with other settings.
    """
    asked = {f"{short(task)}-seed-{seed}": our_config(o, task, seed, more) for task in o.tasks for seed in o.seeds}
    plan = Plan(list(argv), SweepFolder(o.out), asked, None, o.parallel, jobs=False, program="benchmarks.curves")
    parser = run_parser("benchmarks.curves", "")
    before = {
        path.stem: run_config(parser, parser.parse_args(["--config", str(path)]))
        for path in sorted((o.out / "configs").glob("*.yaml"))
    }
    with begun(dataclasses.replace(plan, runs={**before, **asked})):
        note_call(o.out, "benchmarks.curves", argv, {"--out": "OUT"})
        return carry_out(plan)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, then write."""
    argv = sys.argv[1:] if argv is None else argv
    o, more = parse(argv)
    ended = 0
    if not o.table:
        try:
            ended = train_all(o, argv, more)
        except ValueError as error:
            sys.exit(f"benchmarks.curves: {error}".replace("--sweep-dir", "--out"))
    o.out.mkdir(parents=True, exist_ok=True)
    write(read_results(o.out), o.out)
    print(f"\n{(o.out / 'table.md').read_text()}\n{o.out / 'table.md'}, compare.html, curves.csv, curves.svg")
    return ended


if __name__ == "__main__":
    sys.exit(main())
