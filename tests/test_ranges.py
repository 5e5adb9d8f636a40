"""Every number of all configs has a range, and what lies outside is refused with the field's name."""

import dataclasses
import math
import typing

import numpy as np
import pytest
import torch

from tests.tdmpc2_models import TINY
from worldloom import create_world_model
from worldloom.diamond import config as diamond
from worldloom.dreamerv3 import config as dreamerv3
from worldloom.functional import unimix_log_probs
from worldloom.ranges import Range
from worldloom.storm import config as storm
from worldloom.tdmpc2 import Task, TDMPC2Agent, TDMPC2WorldModel
from worldloom.tdmpc2 import config as tdmpc2

CONFIGS = [
    (tdmpc2.TDMPC2Config, tdmpc2.RANGES),
    (dreamerv3.DreamerV3Config, dreamerv3.RANGES),
    (storm.STORMConfig, storm.RANGES),
    (diamond.DiamondConfig, diamond.RANGES),
]


@pytest.mark.parametrize(("config", "ranges"), CONFIGS, ids=["tdmpc2", "dreamerv3", "storm", "diamond"])
def test_every_number_has_a_range(config, ranges):
    hints = typing.get_type_hints(config)
    numbers = {n for n, kind in hints.items() if {int, float} & {kind, *typing.get_args(kind)}}
    assert ranges.keys() == numbers
    assert all(
        getattr(config(), name) is None or getattr(config(), name) in allowed for name, allowed in ranges.items()
    )


@pytest.mark.parametrize(("config", "ranges"), CONFIGS, ids=["tdmpc2", "dreamerv3", "storm", "diamond"])
def test_numbers_outside_of_their_range_are_refused(config, ranges):
    hints = typing.get_type_hints(config)
    for name, allowed in ranges.items():
        kind = int if hints[name] is int else float
        outside = [kind(allowed.low - 1)] if allowed.low > -1e30 else []
        outside += [kind(allowed.high + 1)] if allowed.high < 1e30 else []
        outside += [math.nan, math.inf] if kind is float else []
        outside += [kind(allowed.low)] if allowed.low_open else []
        for value in outside:
            with pytest.raises(ValueError, match=rf"agent\.{name} is .*, expected"):
                config(**{name: value})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"temperature": -1.0}, "agent.temperature is -1.0, expected at least 0"),
        ({"tau": 5.0}, r"agent.tau is 5.0, expected a number in \(0, 1\]"),
        ({"simnorm_dim": 0}, "agent.simnorm_dim is 0, expected at least 1"),
        ({"log_std_min": 3.0}, "agent.log_std_min is 3.0, expected less than log_std_max=2.0"),
        ({"discount_min": 0.999}, "agent.discount_min is 0.999, expected at most discount_max=0.995"),
        ({"latent_dim": 12}, "agent.latent_dim is 12, expected a multiple of simnorm_dim=8"),
    ],
)
def test_a_number_that_makes_no_sense_is_named(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        tdmpc2.TDMPC2Config(**fields)


def test_ranges_hold_their_bounds_unless_open():
    assert 0 in Range(0, 1)
    assert 1 in Range(0, 1)
    assert 0 not in Range(0, 1, low_open=True)
    assert 1 not in Range(0, 1, high_open=True)
    assert math.nan not in Range()
    assert [str(r) for r in (Range(2), Range(0, low_open=True), Range(0, 1, high_open=True))] == [
        "at least 2",
        "above 0",
        "a number in [0, 1)",
    ]


def test_discrete_policies_need_an_entropy_bonus():
    with pytest.raises(ValueError, match="agent.entropy_coef is 0 with discrete actions, expected above 0"):
        create_world_model("tdmpc2:1m", (3,), 3, action_classes=(3,), entropy_coef=0.0)


def test_a_number_of_no_task_is_refused():
    tasks = [Task("a", 2, 200), Task("b", 2, 200)]
    model = TDMPC2WorldModel((3,), 2, dataclasses.replace(TINY, task_dim=4), tasks=tasks)
    with pytest.raises(ValueError, match="act: task numbers are 30 to 30, expected 0 to 1"):
        TDMPC2Agent(model).act(np.zeros((1, 3), np.float32), None, np.ones(1, bool), task=np.array([30]))


def test_without_a_uniform_share_logits_far_apart_give_finite_log_probabilities():
    logits = torch.tensor([120.0, 0.0, 0.0], requires_grad=True)
    found = unimix_log_probs(logits, 0.0)
    torch.testing.assert_close(found, torch.tensor([0.0, -120.0, -120.0]))
    found.sum().backward()
    assert torch.isfinite(logits.grad).all()
