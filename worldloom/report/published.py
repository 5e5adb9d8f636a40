"""Published learning curves, for comparison with a run's own.

DreamerV3: the scores in the authors' repository (training episodes, mean and population standard deviation over seeds;
Hafner et al. 2025). TD-MPC2: the results in the authors' repository (evaluation episodes, mean and sample standard
deviation over 3 seeds; Hansen et al. 2024). STORM: evaluations after the last step, in the authors' repository (20
games; mean and population standard deviation over 5 seeds; Zhang et al. 2023; Freeway is 0 in all of them, other than
in the paper, and a game's return lacks its last reward). DIAMOND: final evaluations (100 games; mean and sample
standard deviation over 5 seeds; Alonso et al. 2024). Frames count action repeats.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from importlib.resources import files

from worldloom.families import resolve
from worldloom.report.subject import Subject

NAMES = {
    "dreamerv3": "DreamerV3, published",
    "tdmpc2": "TD-MPC2, published",
    "storm": "STORM, published",
    "diamond": "DIAMOND, published",
}


@dataclass(frozen=True)
class Curve:
    """A published learning curve; one of a single point is the score of the trained agents."""

    label: str
    frames: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seeds: int


def published_curve(subject: Subject) -> Curve | None:
    """Return the curve that the authors of this algorithm report on this task; None if they report none."""
    suites, task = _suites_and_task(subject)
    family = resolve(subject.algorithm)[0]
    table = (files("worldloom.report") / "published_scores.csv").read_text()
    known = csv.DictReader(table.splitlines())
    rows = [row for row in known if (row["family"], row["task"]) == (family, task) and row["suite"] in suites]
    if not rows:
        return None
    rows.sort(key=lambda row: int(row["frames"]))
    return Curve(
        f"{NAMES[family]} ({rows[0]['seeds']} seeds)",
        tuple(int(row["frames"]) for row in rows),
        tuple(float(row["mean"]) for row in rows),
        tuple(float(row["std"] or 0) for row in rows),
        int(rows[0]["seeds"]),
    )


def _suites_and_task(subject: Subject) -> tuple[set[str], str]:
    """Return the names in the table: ({"dmc_proprio"}, "walker_walk") for dm_control/walker-walk-v0, ({"atari100k"},
    "ms_pacman") for ALE/MsPacman-v5. A family has scores of one of the suites at most."""
    namespace, _, name = subject.env_id.rpartition("/")
    name = re.sub(r"-v\d+$", "", name)
    if namespace == "dm_control":
        suite = {"states": "dmc_proprio", "pixels": "dmc_vision"}.get(subject.dmc.observations, "")
        return {suite}, name.replace("-", "_")
    if namespace == "ALE":  # the 200M protocol has sticky actions; Atari100k has none, but with STORM
        suites = {"atari57", "atari100k_sticky"} if subject.atari.sticky else {"atari100k"}
        return suites, re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
    return set(), name
