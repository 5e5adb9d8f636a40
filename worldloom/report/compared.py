"""Runs that are compared: their records, grouped by task and by what differs in their configurations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from worldloom.envs.suites import AtariConfig, DMCConfig
from worldloom.report.boards import flat
from worldloom.report.page import read_metrics
from worldloom.report.subject import Subject
from worldloom.types import Array

SEED = "train.seed"
OF_THE_MACHINE = (  # they decide what a run costs and writes, not what it learns; names and their beginnings
    "log.", "checkpoint.", "runtime.learner_threads", "runtime.collect_timeout", "runtime.build_timeout",
    "runtime.silence_timeout", "runtime.learner_timeout", "runtime.replay_timeout",
)  # fmt: skip
NO_VARIANT = (*OF_THE_MACHINE, "env.id", SEED)  # the last two group the runs already
EVALUATION, TRAINING = "eval/return_mean", "episode/return"


@dataclass(frozen=True)
class ComparedRun:
    """The records of one run. fields: its configuration by dotted names; summary: None before its end."""

    name: str
    subject: Subject
    fields: dict[str, Any]
    lines: list[dict[str, float]]
    summary: dict[str, Any] | None

    def curve(self, metric: str, unit: str) -> tuple[Array, Array]:
        """Return x and y of a metric; unit of x: frames or seconds. If x repeats (after a resume), the last counts."""
        scale = {"frames": self.subject.action_repeat, "seconds": 1}[unit]
        name = {"frames": "env_steps", "seconds": "wall_seconds"}[unit]
        points = {scale * line[name]: line[metric] for line in self.lines if metric in line and name in line}
        x = sorted(points)
        return np.array(x, float), np.array([points[at] for at in x], float)

    @property
    def final_return(self) -> float | None:
        """The return of the last evaluation or, without any, of the last training episodes."""
        for metric in (EVALUATION, TRAINING):
            if values := [line[metric] for line in self.lines if metric in line]:
                return values[-1]
        return None

    @property
    def env_steps(self) -> int:
        return int(max((line.get("env_steps", 0) for line in self.lines), default=0))

    @property
    def wall_seconds(self) -> float:
        return max((line.get("wall_seconds", 0.0) for line in self.lines), default=0.0)

    @property
    def status(self) -> str:
        return self.summary["status"] if self.summary else "not finished"


Groups = dict[str, dict[str, list[ComparedRun]]]  # runs by task, then by variant: they differ in their seeds alone


def read_compared(folders: Iterable[Path]) -> list[ComparedRun]:
    """Read run directories, and folders of them such as a sweep's. Raises FileNotFoundError or ValueError."""
    found: list[Path] = []
    for folder in folders:
        inside = (
            [folder] if (folder / "config.yaml").is_file() else sorted(p.parent for p in folder.glob("*/config.yaml"))
        )
        if not inside:
            raise FileNotFoundError(f"{folder} holds no config.yaml, expected the directory of a run or of a sweep.")
        found += [path for path in inside if path.resolve() not in [known.resolve() for known in found]]
    runs = [run for path in found if (run := _read(path)).lines]
    if not runs:
        raise ValueError("none of these runs has metrics yet. Compare them once they have logged some.")
    return runs


def _read(run_dir: Path) -> ComparedRun:
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    env, summary = config["env"], run_dir / "summary.json"
    subject = Subject(
        algorithm=config["algorithm"],
        env_id=env["id"],
        action_repeat=env["action_repeat"],
        atari=AtariConfig(**env.get("atari", {})),
        dmc=DMCConfig(**env.get("dmc", {})),
        total_steps=config["train"]["total_steps"],
        seed=config["train"]["seed"],
        runtime=config["runtime"]["kind"],
    )
    lines = read_metrics(run_dir) if (run_dir / "metrics.jsonl").is_file() else []
    ended = json.loads(summary.read_text()) if summary.is_file() else None
    return ComparedRun(run_dir.resolve().name, subject, flat(config), lines, ended)


def differences(runs: Sequence[ComparedRun]) -> dict[str, dict[str, list[str]]]:
    """Return the fields whose values differ: for each value, as text, the names of the runs that have it."""
    found: dict[str, dict[str, list[str]]] = {}
    for field in dict.fromkeys(name for run in runs for name in run.fields):
        values: dict[str, list[str]] = {}
        for run in runs:
            values.setdefault(shown_value(run.fields.get(field)), []).append(run.name)
        if len(values) > 1:
            found[field] = values
    return found


def grouped(runs: Sequence[ComparedRun]) -> Groups:
    """Group runs by task and variant. A field makes a variant if it differs between two runs of one task."""
    by_task: dict[str, list[ComparedRun]] = {}
    for run in runs:
        by_task.setdefault(run.subject.env_id, []).append(run)
    varied = {field for same in by_task.values() for field in differences(same) if not field.startswith(NO_VARIANT)}
    order = [field for field in dict.fromkeys(name for run in runs for name in run.fields) if field in varied]
    groups: Groups = {}
    for task, same in by_task.items():
        variants = groups.setdefault(task, {})
        for run in same:
            variants.setdefault(_variant(run, order), []).append(run)
    return groups


def _variant(run: ComparedRun, fields: Sequence[str]) -> str:
    parts = [shown_value(run.fields.get(field)) for field in fields if field == "algorithm"]
    parts += [f"{field} {shown_value(run.fields.get(field))}" for field in fields if field != "algorithm"]
    return ", ".join(parts) or run.subject.algorithm


def normalised(groups: Groups) -> tuple[dict[str, dict[str, Array]], str]:
    """Return final returns [seeds] by task and variant on one scale for all tasks, and a sentence that names the scale.

    Only tasks that every variant has played, and runs with a return.
    """
    variants = {variant for same in groups.values() for variant in same}
    shared: dict[str, dict[str, Array]] = {}
    for task, same in groups.items():
        scores = {variant: _final_returns(runs) for variant, runs in same.items()}
        if set(scores) == variants and all(len(values) for values in scores.values()):
            shared[task] = scores
    if shared and all(task.startswith("dm_control/") for task in shared):
        return _scaled(shared, dict.fromkeys(shared, (0.0, 1000.0))), "Scores are returns divided by 1,000."
    ends = {task: _ends(scores) for task, scores in shared.items()}
    text = "In each task, 0 is the lowest final return of all these runs and 1 is the highest."
    return _scaled(shared, ends), text


def _final_returns(runs: Sequence[ComparedRun]) -> Array:
    return np.array([run.final_return for run in runs if run.final_return is not None], float)


def _ends(scores: Mapping[str, Array]) -> tuple[float, float]:
    together = np.concatenate(list(scores.values()))
    return float(together.min()), float(together.max())


def _scaled(
    scores: Mapping[str, Mapping[str, Array]], ends: Mapping[str, tuple[float, float]]
) -> dict[str, dict[str, Array]]:
    return {
        task: {name: (values - ends[task][0]) / (ends[task][1] - ends[task][0] or 1.0) for name, values in same.items()}
        for task, same in scores.items()
    }


def shown_value(value: Any) -> str:
    """Return a value of a configuration as YAML shows it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
