"""Tests what several learners need of a configuration and of an agent, and the hash that compares them."""

import queue
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gymnasium.spaces import Box

from benchmarks.learners import TimedGang, efficiency, measure_together, paper_table, reduce_seconds, take
from tests.run_configs import tiny_config
from tests.tdmpc2_models import batch_of as tdmpc2_batch
from worldloom import create_agent
from worldloom.gang import Gang
from worldloom.runs.build import check_config
from worldloom.runs.config import RuntimeConfig
from worldloom.runs.learners import carried_of, divisors, fingerprint, join


def test_a_number_that_does_not_divide_the_batch_is_refused_with_those_that_do():
    check_config(tiny_config(runtime=RuntimeConfig(learners=4)))
    with pytest.raises(ValueError, match=r"runtime.learners is 3, expected .* the 8 windows .*: 1, 2, 4 or 8\."):
        check_config(tiny_config(runtime=RuntimeConfig(learners=3)))
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"learners": 0}, r"runtime.learners is 0, expected at least 1\."),
        ({"learners": 2, "kind": "inline"}, r"runtime.learners is 2, expected 1 with runtime.kind inline"),
        ({"receipt_interval": 0}, r"runtime.receipt_interval is 0, expected at least 1\."),
    ],
)
def test_settings_out_of_range_are_refused(fields, expected):
    with pytest.raises(ValueError, match=expected):
        RuntimeConfig(**fields)


def test_a_family_that_cannot_share_updates_is_refused():
    class Alone:
        learning = None

    with pytest.raises(ValueError, match="runtime.learners is 2, expected 1 with mine:tiny: updates of its family"):
        join(Alone(), Gang(0, 2), "mine:tiny")


def test_the_hash_tells_bits_places_and_types_apart():
    x = torch.randn(1000)
    same, moved, swapped = x.clone(), x.clone(), x.clone()
    moved[7] = torch.nextafter(moved[7], torch.tensor(9.0))
    swapped[3], swapped[4] = x[4], x[3]
    known = fingerprint([x, torch.tensor([True, False])])
    assert fingerprint([same, torch.tensor([True, False])]) == known
    others = [[moved, torch.tensor([True, False])], [swapped, torch.tensor([True, False])]]
    others += [[x, torch.tensor([False, True])], [torch.tensor([True, False]), x]]
    assert known not in {fingerprint(tensors) for tensors in others}
    zeros = fingerprint([torch.zeros(3, dtype=torch.bfloat16)])
    assert zeros != fingerprint([torch.tensor([0.0, 0.0, -0.0], dtype=torch.bfloat16)])  # bits, not values


def test_the_hash_covers_every_parameter_and_buffer_of_an_agent_and_what_its_updates_hand_on():
    spaces = Box(-1, 1, (3,)), Box(-1, 1, (1,))
    agent = create_agent("tdmpc2:1m", *spaces, encoder_dim=16, mlp_dim=16, latent_dim=16)
    agent.update(tdmpc2_batch(agent.world_model))
    known, learning = fingerprint(carried_of(agent)), agent.learning
    modules = [
        value for value in agent.world_model.state_dict().values() if value.is_floating_point() and value.numel()
    ]
    moments = [state["exp_avg"] for state in learning.model_optimizer.adam.state.values()]
    for value in [*modules, *moments, learning.scale.value]:
        kept = value.clone()
        value.view(-1)[-1] += 1
        assert fingerprint(carried_of(agent)) != known
        value.copy_(kept)
    assert fingerprint(carried_of(agent)) == known
    torch.rand(1, generator=learning.generator)
    assert fingerprint(carried_of(agent)) != known


def test_the_page_has_the_arithmetic_of_the_benchmark():
    assert reduce_seconds(12e6, 4, 25e9) == pytest.approx(2.88e-3)  # 2 x 3 / 4 x 48 MB / 25 GB/s
    assert efficiency(12e6, 0.029, 4, 25e9) == pytest.approx(7.25 / (7.25 + 2.88))
    assert efficiency(200e6, 0.129, 1, 25e9) == 1.0
    page = (Path(__file__).parents[2] / "docs" / "tutorials" / "learners.md").read_text()
    assert "\n".join(paper_table()) in page


def test_the_benchmark_times_every_collective(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda part, group: part.mul_(2))
    gang = TimedGang(0, 2)
    x = torch.ones(4, requires_grad=True)
    gang.average(x.sum()).backward()
    assert x.grad.tolist() == [1.0] * 4
    gradient, loss = gang.mean(torch.tensor([3.0, 5.0]), torch.tensor(7.0))
    assert (gradient.tolist(), loss.item()) == ([3.0, 5.0], 7.0)
    assert [size for _, size in gang.spent] == [4, 4, 12]  # bytes: a mean and its gradient, then both of `mean`
    assert all(seconds >= 0 for seconds, _ in gang.spent)


def test_the_benchmark_ends_when_a_learner_has_ended_without_an_answer():
    def nothing(timeout):
        raise queue.Empty

    processes = [SimpleNamespace(exitcode=None), SimpleNamespace(exitcode=-9)]
    with pytest.raises(RuntimeError, match="learner/1 ended without an answer"):
        take(SimpleNamespace(get=nothing), processes)


@pytest.mark.slow
def test_the_benchmark_says_why_a_learner_failed():
    options = Namespace(model="dreamerv3:size1m", obs="no such observation", batch=4, length=8, updates=1)
    with pytest.raises(RuntimeError, match=r"learner/. failed: .*no such observation"):
        measure_together(2, 1, options)
