"""report.html: the results of a run in one file that needs no other; and what all pages share."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.report.lines import current_lines
from worldloom.report.published import published_curve
from worldloom.report.subject import Subject
from worldloom.report.timing import WARM_UP

INK, SOFT, OWN, TRAINING, PUBLISHED = "#1c2430", "#5b6675", "#2a6fdb", "#9db8e8", "#c2571a"
PICTURE, FILM = "imagined.png", "imagined.gif"
FEW = 3  # points of a line that are drawn as points, too: one alone would not be seen
STEADY = 0.02  # of a value's size: smaller changes are not magnified to the height of a plot


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    picture: str  # HTML


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its heading."""

    title: str
    text: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """The content of a page. details: texts by name that the reader unfolds."""

    title: str
    verdict: str
    tiles: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    tables: Sequence[Table]
    details: Sequence[tuple[str, str]]

    def write(self, path: Path) -> Path:
        """Write the page in one file that needs no other. Needs jinja2."""
        import jinja2

        template = (files("worldloom.report") / "report.html.j2").read_text()
        path.write_text(jinja2.Environment(autoescape=True).from_string(template).render(page=self))
        return path


def write_report(run_dir: Path, subject: Subject, settings: str = "") -> Path:
    """Write report.html from a run's metrics.jsonl, summary.json, imagined.png and imagined.gif.

    settings: text of its config.yaml. Needs matplotlib and jinja2. Raises FileNotFoundError without summary.json.
    """
    summary = json.loads((run_dir / "summary.json").read_text())
    lines = read_metrics(run_dir)
    sections = [
        returns_section(lines, subject),
        _losses(lines),
        _rates(lines, summary),
        _imagined(run_dir),
    ]
    page = Page(
        title=f"{summary['algorithm']} on {summary['env_id']}",
        verdict=_verdict(summary),
        tiles=_tiles(summary),
        sections=[section for section in sections if section is not None],
        tables=[Table("Figures", rows=[(name, _shown(value)) for name, value in summary.items()])],
        details=[("config.yaml, complete", settings)],
    )
    return page.write(run_dir / "report.html")


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl that hold, as `current_lines` does."""
    return current_lines((run_dir / "metrics.jsonl").read_text().splitlines())


def _verdict(summary: Mapping[str, Any]) -> str:
    ended = {"completed": "The run is complete", "interrupted": "The run was interrupted; it can be resumed"}
    text = ended.get(summary["status"], f"The run is {summary['status']}")
    shares = {name: share for name, share in (summary.get("limited_by") or {}).items() if name != WARM_UP}
    if total := sum(shares.values()):
        most = max(shares, key=lambda name: shares[name])
        text += f". For {shares[most] / total:.0%} of its time after the warm-up it was limited by: {most}"
    return text + "."


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    mean, std = summary["eval_return_mean"], summary["eval_return_std"]
    episodes = summary["eval_episodes"]
    tiles = [] if mean is None else [(f"return over {episodes} evaluation episodes", f"{mean:,.1f} ± {std:,.1f}")]
    return [
        *tiles,
        ("environment steps", f"{summary['env_steps']:,}"),
        ("updates", f"{summary['updates']:,}"),
        ("wall time", duration(summary["wall_seconds"])),
        ("train ratio, actual / target", f"{summary['train_ratio_actual']:.4g} / {summary['train_ratio_target']:g}"),
        ("seed, device, runtime", f"{summary['seed']}, {summary['device']}, {summary['runtime']}"),
    ]


def returns_section(lines: Sequence[Mapping[str, float]], subject: Subject) -> Section:
    """Draw the learning curve of a run, with the published one if the authors report one."""
    figure, axis = axes(1, 1, 9.6, 3.6)
    axis = axis[0]
    repeat = subject.action_repeat
    training = [(line["env_steps"] * repeat, line["episode/return"]) for line in lines if "episode/return" in line]
    evaluated = [line for line in lines if "eval/return_mean" in line]
    if training:
        few = "o" if len(training) < FEW else None
        axis.plot(
            *zip(*training, strict=True),
            color=TRAINING,
            lw=1.4,
            marker=few,
            ms=4,
            label="training, mean of the last 20 episodes",
        )
    if evaluated:
        frames = np.array([line["env_steps"] * repeat for line in evaluated], float)
        mean, std = (np.array([line[f"eval/return_{part}"] for line in evaluated]) for part in ("mean", "std"))
        axis.fill_between(frames, mean - std, mean + std, color=OWN, alpha=0.15, lw=0)
        axis.plot(frames, mean, color=OWN, lw=2, marker="o", ms=4, label="evaluation, mean ± std over episodes")
    text = "Return per episode over frames (environment steps times action repeat)."
    if subject.atari is not None and subject.atari.life_loss == "end":
        text += " Those of training are of one life."
    curve = published_curve(subject)
    reached = 1.25 * max([line["env_steps"] * repeat for line in lines], default=0)
    if curve is None:
        text += " The authors report no curve for this task."
    elif len(curve.frames) == 1 and curve.frames[0] <= reached:
        middle, spread = curve.mean[0], curve.std[0]
        axis.axhspan(middle - spread, middle + spread, color=PUBLISHED, alpha=0.12, lw=0)
        axis.axhline(middle, color=PUBLISHED, lw=1.6, ls="--", label=curve.label)
        text += f" Published: mean and deviation over seeds of agents trained for {curve.frames[0]:,} frames."
    elif sum(x <= reached for x in curve.frames) < 2:
        first = next(i for i, x in enumerate(curve.frames) if x > 0)
        text += f" The authors' first point lies at {curve.frames[first]:,} frames: {curve.mean[first]:,.1f}."
    else:
        shown = [i for i, x in enumerate(curve.frames) if x <= reached]
        x, mean, std = (np.array([part[i] for i in shown], float) for part in (curve.frames, curve.mean, curve.std))
        axis.fill_between(x, mean - std, mean + std, color=PUBLISHED, alpha=0.12, lw=0)
        axis.plot(x, mean, color=PUBLISHED, lw=1.6, ls="--", marker="s", ms=3, label=curve.label)
        text += " Published: mean and deviation over seeds, as the authors report them."
    axis.set_xlabel("frames")
    axis.set_xlim(left=0)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=9, frameon=False, loc="best")
    return Section("Return", text, svg(figure))


def _losses(lines: Sequence[Mapping[str, float]]) -> Section | None:
    names = sorted({name for line in lines for name in line if name.startswith("learner/")})
    if not names:
        return None
    text = "The learner's metrics over environment steps; each point is the mean since the log line before."
    return Section("Learning", text, _multiples(lines, {name: name.removeprefix("learner/") for name in names}))


def _rates(lines: Sequence[Mapping[str, float]], summary: Mapping[str, Any]) -> Section | None:
    names = {
        "rate/env_steps_per_second": "environment steps / s",
        "rate/updates_per_second": "updates / s",
        "rate/learner_busy_fraction": "learner busy, share",
        "rate/train_ratio": "train ratio",
        "weights/staleness_p95": "staleness p95, publishes",
    }
    shown = {name: label for name, label in names.items() if any(name in line for line in lines)}
    if not shown:
        return None
    shares = summary.get("limited_by") or {}
    parts = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda s: -s[1]))
    limits = f" What limited the run, by share of its time: {parts}." if parts else ""
    return Section("Rates", f"The speed of the run.{limits}", _multiples(lines, shown))


def _imagined(run_dir: Path) -> Section | None:
    path, film = run_dir / PICTURE, run_dir / FILM
    if not path.is_file():
        return None
    text = (
        "The world model sees the first steps of a recorded sequence, then predicts the rest from the actions alone. "
        "The command launch.imagine makes such pictures, and films if observations are images or the model has no "
        "decoder."
    )
    shown = _embedded(path, "true and predicted")
    if film.is_file():
        text += (
            " The film shows truth, prediction (bordered green while the model sees, then blue) and their difference."
        )
        shown = f"{_embedded(film, 'film: truth, prediction, difference')}\n{shown}"
    return Section("Imagination", text, shown)


def _embedded(path: Path, told: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{told}" src="data:image/{path.suffix[1:]};base64,{data}">'


def _multiples(lines: Sequence[Mapping[str, float]], names: Mapping[str, str]) -> str:
    """Draw a small plot for each metric over environment steps, as SVG."""
    rows = -(-len(names) // 3)
    figure, panels = axes(rows, 3, 9.6, 1.9 * rows)
    last = max(line["env_steps"] for line in lines)
    for axis, (name, label) in zip(panels, names.items(), strict=False):
        points = [(line["env_steps"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), color=OWN, lw=1.4, marker="o" if len(points) < FEW else None, ms=3)
        axis.set_xlim(0, 1.02 * max(last, 1))
        _calm(axis)
        axis.set_title(label, fontsize=9.5, loc="left", color=INK)
    for axis in panels[len(names) :]:
        axis.set_visible(False)
    return svg(figure)


def _calm(axis: Any) -> None:
    """Widen the range of a value that hardly changes."""
    low, high = axis.get_ylim()
    room = max(STEADY * max(abs(low), abs(high)) - (high - low), 0) / 2
    axis.set_ylim(low - room, high + room)


def axes(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """Make a figure with rows x columns panels in the looks of all pages; width and height in inches."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axis in panels:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#b8c0ca")
        axis.tick_params(labelsize=8.5, colors=SOFT, length=3)
        axis.grid(axis="y", color="#eef1f4", lw=0.8)
        axis.set_axisbelow(True)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.5g}")  # no offset or power above the plot
    return figure, panels


def svg(figure: Any) -> str:
    """Draw a figure as an SVG element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def duration(seconds: float) -> str:
    """Return a time in words, such as 1 h 2 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {share:.0%}" for name, share in value.items())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
