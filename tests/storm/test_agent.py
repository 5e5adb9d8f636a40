"""Tests of STORM's agent: acting, learning, and going on from a checkpoint."""

import dataclasses

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.testing import assert_close

from tests.storm_models import TINY, batch_of, tiny_agent
from worldloom.encoding import pack, unpack
from worldloom.families import agent_from_description
from worldloom.testing import check_family

IMAGES = spaces.Box(0, 255, (3, 48, 48), np.uint8)
MIXED = spaces.Dict({"camera": IMAGES, "state": spaces.Box(-1, 1, (3,), np.float32)})


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


def certain(model, monkeypatch):
    """Let every draw of a latent be its likeliest class."""
    monkeypatch.setattr(model, "draw_noise", lambda *lead, generator=None: torch.ones(*lead, 4, 4))


# Acting


@pytest.mark.parametrize("act_on", ["prior", "posterior"])
def test_acting_keeps_what_observing_keeps(act_on, monkeypatch):
    agent = tiny_agent(act_on=act_on)
    model, state, act_state, first = agent.world_model, None, None, np.ones(2, bool)
    certain(model, monkeypatch)
    for t in range(8):  # more than a memory of 5 tokens
        obs = torch.randn(2, 3)
        before = act_state
        actions, act_state = agent.act(obs.numpy(), act_state, first)
        state = model.observe(state, before["action"], obs) if t else model.encode(obs)
        assert_close(act_state["memory"], state.memory["tokens"])
        assert torch.equal(act_state["filled"], state.memory["filled"])
        assert act_state["filled"].tolist() == [min(t + 1, 5)] * 2
        assert_close(act_state["stoch"], state.stochastic)
        assert_close(torch.from_numpy(actions), act_state["action"])
        tokens = state.memory["tokens"][:, : min(t + 1, 5)]
        place = torch.arange(tokens.shape[1])
        assert_close(state.deterministic, model.transformer(tokens, place, place[:, None] >= place)[:, -1])
        first = np.zeros(2, bool)


def test_the_memory_loses_its_oldest_token_first(monkeypatch):
    model = tiny_agent().world_model
    certain(model, monkeypatch)
    state, made = model.encode(torch.zeros(1, 3)), []
    for action in torch.randn(7, 1, 2):
        made.append(model.token(state.stochastic, action))
        state = model.predict(state, action)
    assert_close(state.memory["tokens"][0], torch.cat(made[-5:]))


def test_an_environment_that_starts_anew_forgets_and_the_others_do_not(monkeypatch):
    agent = tiny_agent()
    certain(agent.world_model, monkeypatch)
    state = None
    for t in range(4):
        _, state = agent.act(np.random.default_rng(t).normal(size=(2, 3)).astype(np.float32), state, np.zeros(2, bool))
    obs = np.ones((2, 3), np.float32)
    _, state = agent.act(obs, state, np.array([True, False]))
    assert state["filled"].tolist() == [1, 5]
    fresh = agent.world_model.encode(torch.from_numpy(obs))
    begun = agent.world_model.initial_state(2)
    for action in (torch.zeros(2, 2), torch.ones(2, 2)):  # before the first observation nothing came
        observed = agent.world_model.observe(begun, action, torch.from_numpy(obs))
        assert_close(observed.features, fresh.features)
        assert observed.memory["filled"].tolist() == [1, 1]
    assert_close(state["memory"][0, 0], fresh.memory["tokens"][0, 0])
    assert_close(state["stoch"][0], fresh.stochastic[0])


@pytest.mark.parametrize(("act_on", "sees"), [("prior", False), ("posterior", True)])
def test_a_policy_on_the_prior_acts_before_it_sees(act_on, sees):
    agent = tiny_agent((3,), 3, (3,), act_on=act_on)
    with torch.no_grad():
        agent.world_model.posterior.weight.mul_(100)
        agent.behaviour.policy.mlp[0].weight[:, :16].mul_(20)  # of the latent
        agent.behaviour.policy.logits.weight.mul_(20)
    acted, rows = [], np.zeros(64, bool)
    for value in (-3.0, 3.0):
        agent.acting_generator.manual_seed(3)
        acted.append(agent.act(np.full((64, 3), value, np.float32), None, ~rows)[0])
    assert np.array_equal(*acted) != sees


def test_images_and_vectors_are_read_together_and_predicted_apart():
    shapes = {"camera": (3, 48, 48), "state": (3,)}
    agent = tiny_agent(shapes, 5, (3, 2))
    losses = agent.world_model.compute_loss(batch_of(agent))
    assert_close(losses["reconstruction_loss"], losses["reconstruction/camera"] + losses["reconstruction/state"])
    decoded = agent.world_model.decode(agent.world_model.initial_state(2))
    assert {name: tuple(value.shape) for name, value in decoded["obs"].items()} == {
        "camera": (2, 3, 48, 48),
        "state": (2, 3),
    }
    assert 0 <= decoded["obs"]["camera"].min() <= decoded["obs"]["camera"].max() <= 1


def test_numbers_that_were_not_observed_cost_nothing():
    agent = tiny_agent()
    batch = batch_of(agent)
    batch["obs"][..., 1] = float("-inf")
    loss = agent.world_model.compute_loss(batch)["reconstruction_loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert not agent.world_model.decoder.outputs[0].weight.grad[1].any()


# Exchange


def test_acting_weights_hold_the_statistics_of_batch_norms():
    agent = tiny_agent((3, 48, 48), 3, (3,))
    for norm in agent.world_model.encoder.image.norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    other = agent_from_description(agent.describe(), seed=1)
    other.load_acting_weights(agent.acting_weights())
    for mine, theirs in zip(agent.world_model.encoder.buffers(), other.world_model.encoder.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(agent.world_model.reward[0].weight, other.world_model.reward[0].weight)  # acting needs none


def everything(agent):
    tensors = [*agent.world_model.state_dict().values(), *agent.behaviour.state_dict().values()]
    return torch.cat([t.flatten().float() for t in tensors])


@pytest.mark.parametrize("shape", [(3,), (3, 48, 48)])
def test_an_agent_goes_on_exactly_from_its_state(shape):
    agent = tiny_agent(shape, 3, (3,), agent_lr=1e-2)
    batches = [batch_of(agent, seed) for seed in range(3)]
    agent.update(batches[0])
    agent.update(batches[1])
    saved = unpack(pack(agent.state_dict()))
    other = agent_from_description(agent.describe(), seed=7)
    other.load_state_dict(saved)
    assert other.updates == 2
    assert other.update(batches[2])[0] == agent.update(batches[2])[0]
    assert torch.equal(everything(agent), everything(other))
    obs = np.zeros((2, *shape), np.uint8 if len(shape) == 3 else np.float32)
    acted = [each.act(obs, None, np.ones(2, bool))[0] for each in (agent, other)]
    assert np.array_equal(*acted)


@pytest.mark.parametrize("name", ["obs", "rewards"])
def test_updates_that_are_not_finite_change_nothing(name):
    agent = tiny_agent({"camera": (3, 48, 48), "state": (3,)}, 3, (3,))
    agent.update(batch_of(agent))
    before, bad = everything(agent), batch_of(agent)
    if name == "obs":
        bad["obs"]["camera"] = bad["obs"]["camera"].float() / 255
        bad["obs"]["camera"][0, 0] = float("nan")  # the statistics of batch norms become NaN too
    else:
        bad["rewards"][0, 2] = float("nan")
    metrics, _ = agent.update(bad)
    assert metrics["skipped_updates"] == 1
    assert torch.equal(everything(agent), before)
    for _ in range(3):
        agent.learn(bad)
    agent.update(batch_of(agent))
    assert not torch.equal(everything(agent), before)
    for _ in range(5):
        agent.learn(bad)
    with pytest.raises(FloatingPointError, match="5 updates in a row gave NaN or infinity in"):
        agent.collect()


def test_a_value_that_is_not_finite_changes_no_policy_and_no_range_of_returns():
    agent = tiny_agent((3,), 3, (3,))
    with torch.no_grad():
        agent.behaviour.value[-1].bias[0] = float("inf")
    before = agent.behaviour.policy.logits.weight.clone()
    assert agent.update(batch_of(agent))[0]["skipped_updates"] == 1
    assert torch.equal(agent.behaviour.policy.logits.weight, before)
    assert agent.behaviour.range.high == 0


def test_batches_of_other_observations_are_refused():
    agent = tiny_agent()
    batch = batch_of(agent)
    with pytest.raises(ValueError, match=r"batch\['obs'\]: obs 'obs' is \(4, 7, 2\), expected \[B, T, \(3,\)\]"):
        agent.learn({**batch, "obs": batch["obs"][..., :2]})
    with pytest.raises(ValueError, match="actions are"):
        agent.learn({**batch, "actions": batch["actions"][..., :1]})
    state = dataclasses.replace(agent.world_model.initial_state(2), memory={})
    with pytest.raises(ValueError, match="predict: the state has no tokens"):
        agent.world_model.predict(state, torch.zeros(2, 2))


# The contract


@pytest.mark.parametrize(
    ("observations", "actions", "act_on"),
    [
        (IMAGES, spaces.Discrete(4), "prior"),
        (MIXED, spaces.MultiDiscrete([3, 2]), "posterior"),
        (spaces.Box(-np.inf, np.inf, (3,), np.float32), spaces.Box(-1.0, 1.0, (2,), np.float32), "prior"),
    ],
    ids=["images", "mixed", "vectors"],
)
def test_storm_holds_what_is_asked_of_a_family(observations, actions, act_on):
    fields = {**TINY, "act_on": act_on, "world_lr": 1e-3, "agent_lr": 1e-3}
    assert not [line for line in check_family("storm:tiny", observations, actions, **fields) if line.wrong]


def test_storm_learns_a_task_of_two_states():
    fields = {
        "hidden": 32, "max_length": 16, "stoch": 4, "classes": 4, "units": 64, "batch_size": 16, "batch_length": 8,
        "context": 2, "acting_context": 4, "imagination_length": 2, "imagination_starts": 128, "discount": 0.8,
        "lam": 0.8, "world_lr": 1e-3, "agent_lr": 2e-3,
    }  # fmt: skip
    found = check_family("storm:tiny", action_space=spaces.Discrete(3), updates=300, **fields)
    assert found[-1].name == "beats chance"
