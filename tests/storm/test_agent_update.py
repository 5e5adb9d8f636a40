"""STORM's policy and critic against two updates by the authors' code, from the parameters of their fixture.

`agent/` holds the parameters before; `update0/` and `update1/` imagined rollouts [N, ...] (drawn at random) with
losses, scale and the gradient's norm; `update0/grad/` and `after/` at most 100 numbers of each gradient and parameter.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.storm_models import FIXTURE_CONFIG
from worldloom.storm import STORMAgent, STORMWorldModel
from worldloom.storm.behaviour import Imagined

DATA = Path(__file__).parents[1] / "data" / "storm_agent_update.npz"
CONFIG = dataclasses.replace(FIXTURE_CONFIG, returns="published")
RATE = CONFIG.agent_lr


def our_name(name):
    """Return the name of one of their parameters in our behaviour."""
    for theirs, ours in (("slow_critic", "slow_value"), ("critic", "value"), ("actor.6", "policy.logits")):
        name = name.replace(theirs, ours) if theirs in name else name
        if ours in name:
            return name
    return name.replace("actor", "policy.mlp")


def thin(values, most=100):
    flat = values.detach().flatten()
    return flat[:: -(-len(flat) // most)]


def near(found, expected, share=1e-5):
    assert_close(found, expected, rtol=0, atol=share * float(expected.abs().max()))


@pytest.fixture(scope="module")
def arrays():
    with np.load(DATA) as loaded:
        return {name: torch.from_numpy(np.asarray(loaded[name])) for name in loaded}


@pytest.fixture
def agent(arrays):
    made = STORMAgent(STORMWorldModel((3, 64, 64), 6, CONFIG), action_classes=(6,))
    given = {our_name(n.removeprefix("agent/")): v for n, v in arrays.items() if n.startswith("agent/")}
    missing, unexpected = made.behaviour.load_state_dict(given, strict=False)
    assert (sorted(missing), unexpected) == (["range.high", "range.low"], [])
    return made


@torch.no_grad()
def rollouts(agent, arrays, update):
    """Return their rollouts as ours, which are time-first, with our critics' values."""
    given = {name: arrays[f"update{update}/{name}"] for name in ("action", "reward", "termination", "hidden")}
    latent = F.one_hot(arrays[f"update{update}/latent_classes"].long(), 8).float().flatten(-2)
    features = torch.cat([latent, given["hidden"]], -1).transpose(0, 1)
    behaviour, expected = agent.behaviour, agent.world_model.expected
    return Imagined(
        features,
        F.one_hot(given["action"].long(), 6).float().transpose(0, 1),
        given["reward"].T,
        agent.config.discount * (~given["termination"]).float().T,
        expected(behaviour.value(features)),
        expected(behaviour.slow_value(features)),
    )


def test_two_updates_of_policy_and_critic_are_the_authors(agent, arrays, monkeypatch):
    learning, before = agent.learning, {n: v.clone() for n, v in agent.behaviour.state_dict().items()}
    for update in range(2):
        imagined = rollouts(agent, arrays, update)
        monkeypatch.setattr(learning, "imagine", lambda batch, noise, made=imagined: made)
        logged, made = learning.update_agent({}, None, torch.tensor(True))
        assert made
        expected = {n.split("/")[-1]: v for n, v in arrays.items() if n.startswith(f"update{update}/loss/")}
        total = logged["policy_loss"] + logged["value_loss"]
        near(total, expected["total_loss"])
        near(logged["policy_loss"] + agent.config.entropy_scale * expected["entropy_loss"], expected["policy_loss"])
        near(logged["policy_entropy"], expected["entropy_loss"])
        assert expected["S"] > 1.5
        near(logged["return_range"], expected["S"])
        near(logged["agent_grad_norm"], arrays[f"update{update}/grad_norm"])
        if update == 0:
            for name, parameter in agent.behaviour.named_parameters():
                if parameter.requires_grad:
                    near(thin(parameter.grad), theirs(arrays, "update0/grad", name))
    for name, value in agent.behaviour.state_dict().items():
        if not name.startswith("range"):
            assert_close(thin(value), theirs(arrays, "after", name), rtol=0, atol=0.02 * RATE)
            assert (value - before[name]).abs().max() > (0.01 if name.startswith("slow") else 1) * RATE


def theirs(arrays, kind, name):
    known = {our_name(n.removeprefix(f"{kind}/")): v for n, v in arrays.items() if n.startswith(f"{kind}/")}
    return known[name]
