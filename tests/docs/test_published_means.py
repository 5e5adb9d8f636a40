"""The means of published scores in docs/tutorials/choosing.md follow from the scores that are packaged."""

import csv
import re
from pathlib import Path
from statistics import mean, median

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Scores of random play and of people, after Mnih et al. 2015 and Wang et al. 2016, as Atari100k is reported with them.
RANDOM_AND_HUMAN = {
    "alien": (227.8, 7127.7), "amidar": (5.8, 1719.5), "assault": (222.4, 742.0), "asterix": (210.0, 8503.3),
    "bank_heist": (14.2, 753.1), "battle_zone": (2360.0, 37187.5), "boxing": (0.1, 12.1), "breakout": (1.7, 30.5),
    "chopper_command": (811.0, 7387.8), "crazy_climber": (10780.5, 35829.4), "demon_attack": (152.1, 1971.0),
    "freeway": (0.0, 29.6), "frostbite": (65.2, 4334.7), "gopher": (257.6, 2412.5), "hero": (1027.0, 30826.4),
    "jamesbond": (29.0, 302.8), "kangaroo": (52.0, 3035.0), "krull": (1598.0, 2665.5),
    "kung_fu_master": (258.5, 22736.3), "ms_pacman": (307.3, 6951.6), "pong": (-20.7, 14.6),
    "private_eye": (24.9, 69571.3), "qbert": (163.9, 13455.0), "road_runner": (11.5, 7845.0),
    "seaquest": (68.4, 42054.7), "up_n_down": (533.4, 11693.2),
}  # fmt: skip


def scores(family, suite, frames):
    """Return the published mean of each task."""
    with (ROOT / "worldloom" / "report" / "published_scores.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if (row["family"], row["suite"]) == (family, suite)]
    return {row["task"]: float(row["mean"]) for row in rows if int(row["frames"]) == frames}


def cells(line_begins):
    """Return the cells of the columns DreamerV3, TD-MPC2, STORM and DIAMOND."""
    lines = (ROOT / "docs" / "tutorials" / "choosing.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {line_begins}")]
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


@pytest.mark.parametrize(
    ("name", "suite", "frames_of_dreamerv3", "tasks"),
    [("states", "dmc_proprio", 490_000, 18), ("images", "dmc_vision", 500_000, 12)],
)
def test_means_over_deepmind_control_are_of_the_tasks_that_both_report(name, suite, frames_of_dreamerv3, tasks):
    dreamerv3, tdmpc2 = scores("dreamerv3", suite, frames_of_dreamerv3), scores("tdmpc2", suite, 500_000)
    both = sorted(set(dreamerv3) & set(tdmpc2))
    assert len(both) == tasks
    row = cells("published, from images" if name == "images" else "published, DeepMind Control from states")
    assert row[:2] == [f"{mean(of[task] for task in both):.1f}" for of in (dreamerv3, tdmpc2)]


@pytest.mark.parametrize(
    ("column", "family", "suite"),
    [(0, "dreamerv3", "atari100k"), (2, "storm", "atari100k_sticky"), (3, "diamond", "atari100k")],
)
def test_atari_is_normalised_by_random_play_and_people(column, family, suite):
    found = scores(family, suite, 400_000)
    assert set(found) == set(RANDOM_AND_HUMAN)
    normal = [(found[game] - low) / (high - low) for game, (low, high) in RANDOM_AND_HUMAN.items()]
    written = re.match(r"(\d+) %, (\d+) %", cells("published, Atari100k")[column])
    assert written is not None
    assert [int(figure) for figure in written.groups()] == [round(100 * f(normal)) for f in (mean, median)]
