"""STORM's imagination, and what one update of the world model changes, against the authors' code.

`tests/data/storm_imagination.npz`, from the parameters of their fixture. `imagine/`: six contexts of four frames (each
of 8 × 8 blocks), the noise of every draw, and what was imagined in five steps on the prior. `grad/` and `after/`: at
most 60 numbers of each gradient before clipping, and of each parameter and running statistic after the update.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.storm.test_agent_update import near, thin
from tests.storm.test_agent_update import our_name as behaviour_name
from tests.storm_models import FIXTURE_CONFIG, fixture, fixture_batch, our_name
from worldloom.storm import STORMAgent
from worldloom.storm.learning import ImaginationNoise
from worldloom.storm.losses import WorldNoise

DATA = Path(__file__).parents[1] / "data"
RATE = FIXTURE_CONFIG.world_lr
MOST = 60  # numbers of a gradient or parameter


@pytest.fixture(scope="module")
def theirs():
    with np.load(DATA / "storm_imagination.npz") as loaded:
        return {name: torch.from_numpy(np.asarray(loaded[name])) for name in loaded}


def agent_of(model, **overrides):
    """Return an agent with that model, its config changed, and the parameters of their agent."""
    model.config = dataclasses.replace(model.config, **overrides)
    agent = STORMAgent(model, action_classes=(6,))
    with np.load(DATA / "storm_agent_update.npz") as loaded:
        given = {n.removeprefix("agent/"): loaded[n] for n in loaded if n.startswith("agent/")}
    agent.behaviour.load_state_dict({behaviour_name(n): torch.from_numpy(v) for n, v in given.items()}, strict=False)
    return agent


def test_imagined_rollouts_are_the_authors(theirs):
    given = {name.removeprefix("imagine/"): value for name, value in theirs.items() if name.startswith("imagine/")}
    agent = agent_of(fixture()[1], act_on="prior", imagination_starts=6)
    obs = given["blocks"].repeat_interleave(8, -1).repeat_interleave(8, -2)
    batch = {  # as rows that arrive, with a last one whose frame nobody reads
        "obs": F.pad(obs, (0, 0, 0, 0, 0, 0, 0, 1), value=255),
        "actions": F.pad(F.one_hot(given["context_action"].long(), 6).float(), (0, 0, 1, 0)),
        "rewards": torch.zeros(6, 5),
    }
    noise = ImaginationNoise(
        F.pad(given["noise_posterior"], (0, 0, 0, 0, 0, 1), value=1.0),
        torch.tensor([0.9, 0.8, 0.7, 0.1]).expand(6, 4),  # the start is the last row of each
        given["noise_prior"],
        given["noise_action"],
    )
    found = agent.learning.imagine(batch, noise)
    latents, hidden = found.features.transpose(0, 1).split([64, 32], -1)
    assert torch.equal(latents, F.one_hot(given["latent_classes"].long(), 8).float().flatten(-2))
    near(hidden, given["hidden"])
    assert torch.equal(found.actions.argmax(-1).T, given["action"].long())
    near(found.rewards.T, given["reward"])
    assert 0.2 < given["termination"].float().mean() < 0.8
    assert torch.equal(found.continues.T, agent.config.discount * (~given["termination"]).float())


def test_every_gradient_and_all_that_an_update_changes_are_the_authors(theirs):
    arrays, model = fixture()
    agent, before = agent_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    _, norm, made = agent.learning.update_world(fixture_batch(arrays), WorldNoise(arrays["noise_post"], ()))
    assert made
    near(norm, arrays["grad_norm"])
    by_kind = {"grad": {}, "after": {}}
    for name, value in theirs.items():
        kind, _, rest = name.partition("/")
        if kind in by_kind:
            by_kind[kind][our_name(rest)] = value
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == by_kind["grad"].keys()
    for name, expected in by_kind["grad"].items():  # ours are clipped already
        near(thin(gradients[name], MOST), expected * agent.config.world_clip / arrays["grad_norm"])
    for name, expected in by_kind["after"].items():
        found = model.state_dict()[name]
        if "running" in name:
            near(thin(found, MOST), expected)
        else:
            assert_close(thin(found, MOST), expected, rtol=0, atol=0.02 * RATE)  # an update is a rate at most
        assert not torch.equal(found, before[name])
