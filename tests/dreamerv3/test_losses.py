"""DreamerV3's losses: their values, their scales, and which parameters each of them reaches."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close

from tests.dreamerv3_models import batch_of, loss_parts, shake, tiny_agent
from worldloom.dreamerv3 import SIZES, DreamerV3Agent, DreamerV3Config, DreamerV3WorldModel


def entropy(log_probs):
    """In nats, summed over groups, mean over rows."""
    return -(log_probs.exp() * log_probs).sum((-2, -1)).mean().item()


@pytest.mark.parametrize("seed", [1, 2])
def test_losses_at_initialisation_equal_the_reference(seed):
    torch.manual_seed(seed)
    model = DreamerV3WorldModel((24,), 6, DreamerV3Config(**SIZES["size1m"], batch_length=64, replay_context="zeros"))
    agent = DreamerV3Agent(model)
    batch = batch_of(agent, seed)
    batch["truncated"][:, 20] = True
    before = copy.deepcopy({**dict(model.named_parameters()), **dict(agent.behaviour.named_parameters())})
    seen = {}

    def spy(owner, name):
        call = getattr(owner, name)
        setattr(owner, name, lambda *args: seen.setdefault(name, call(*args)))

    spy(model, "losses")
    spy(agent.learning, "imagine")
    metrics, columns = agent.update(batch)
    assert columns == {}
    with torch.no_grad():
        continues = model.continues(seen["imagine"].features).sigmoid()[..., 0]
        posterior = seen["losses"].posterior
        entropies = [entropy(posterior.log_probs), entropy(model.rssm.prior(posterior.states.deter))]
    assert continues.std() > 0.05
    weight = continues[:-1].cumprod(0).mean().item()
    assert metrics["value_loss"] == pytest.approx(2 * math.log(255) * weight, rel=1e-5)
    assert metrics["reward_loss"] == pytest.approx(math.log(255), rel=1e-5)
    assert metrics["replay_value_loss"] == pytest.approx(2 * math.log(255) * 62 / 63, rel=1e-4)  # 10.90661
    assert metrics["policy_entropy"] == pytest.approx(6 * 1.30545, rel=2e-3)
    assert metrics["dynamics_loss"] == pytest.approx(metrics["representation_loss"])
    assert metrics["dynamics_loss"] == pytest.approx(6.9, abs=0.5)
    assert entropies == pytest.approx([41.1, 41.1], abs=1.0)  # of at most 44.361
    for name, value in [*model.named_parameters(), *agent.behaviour.named_parameters()]:
        assert torch.equal(value, before[name]), name  # warm-up: the first update has learning rate 0


def test_an_update_minimises_the_scaled_sum_of_its_losses():
    agent = shake(tiny_agent(free_nats=0.0))
    metrics, _ = agent.update(batch_of(agent))
    scales = {
        "reconstruction_loss": 1, "reward_loss": 1, "continue_loss": 1, "dynamics_loss": 1,
        "representation_loss": 0.1, "policy_loss": 1, "value_loss": 1, "replay_value_loss": 0.3,
    }  # fmt: skip
    assert {name for name in metrics if name.endswith("_loss")} == scales.keys()
    assert all(abs(metrics[name]) > 1e-3 for name in scales)
    assert metrics["loss"] == pytest.approx(sum(scale * metrics[name] for name, scale in scales.items()), rel=1e-6)


def test_the_dynamics_loss_counts_fully_and_the_representation_loss_a_tenth():
    """The two are equal numbers: only gradients tell their scales apart. Only the first reaches the prior."""
    agent = shake(tiny_agent(free_nats=0.0))
    _, world, _ = loss_parts(agent, batch_of(agent))
    prior = agent.world_model.rssm.prior_logits.weight
    (total,) = torch.autograd.grad(world.total, prior, retain_graph=True)
    (dynamics,) = torch.autograd.grad(world.parts["dynamics_loss"], prior)
    assert dynamics.any()
    assert_close(total, dynamics)


@pytest.mark.parametrize(
    ("logit", "terminated", "expected"),
    [
        (0.0, False, 0.693147181),
        (2.0, False, 0.132934017),
        (5.805135, False, 0.020440359),  # the minimum
        (2.0, True, 2.126928011),  # ln(1 + e^2): a true end has no soft target
    ],
)
def test_continue_loss_has_soft_targets_and_equals_golden_values(logit, terminated, expected):
    agent = tiny_agent()
    batch, output = batch_of(agent), agent.world_model.continues.output
    batch["terminated"][:] = terminated
    with torch.no_grad():
        output.weight.zero_()
        output.bias.fill_(logit)
    _, world, _ = loss_parts(agent, batch)
    assert world.parts["continue_loss"].item() == pytest.approx(expected, abs=1e-6)
    (slope,) = torch.autograd.grad(world.parts["continue_loss"], output.bias)
    target = 0.0 if terminated else 1 - 1 / 333
    assert slope.item() == pytest.approx(1 / (1 + math.exp(-logit)) - target, abs=1e-6)


def gradients(agent, loss, depth=1):
    """Names of the parts that a loss reaches, to a depth of `rssm` or `rssm.core`."""
    for parameter in [*agent.world_model.parameters(), *agent.behaviour.parameters()]:
        parameter.grad = None
    loss.backward(retain_graph=True)
    reached = set()
    for module in (agent.world_model, agent.behaviour):
        for name, parameter in module.named_parameters():
            if parameter.grad is not None and parameter.grad.any():
                reached.add(".".join(name.split(".")[:depth]))
    return reached


@pytest.mark.parametrize("classes", [(), (3,)])
def test_each_loss_reaches_its_own_parameters_only(classes):
    agent = shake(tiny_agent(action_dim=3, classes=classes))
    rows, world, imagined = loss_parts(agent, batch_of(agent))
    returns = imagined.returns(0.95)
    behaviour, _ = agent.learning._behaviour_losses(imagined, returns, agent.behaviour.range.scale)
    expected = {
        "reconstruction_loss": {"encoder", "rssm", "decoder"},
        "reward_loss": {"encoder", "rssm", "reward"},
        "continue_loss": {"encoder", "rssm", "continues"},
    }
    for name, parts in expected.items():
        assert gradients(agent, world.parts[name]) == parts, name
    assert gradients(agent, behaviour["policy_loss"]) == {"policy"}
    assert gradients(agent, behaviour["value_loss"]) == {"value"}
    ends = tuple(rows[name].float().T for name in ("rewards", "terminated", "truncated", "is_first"))
    features = world.posterior.states.features
    replayed = agent.learning._replay_value_loss(ends, features, imagined.slow_values[0], returns[0])
    assert gradients(agent, replayed) == {"encoder", "rssm", "value"}


def test_dynamics_loss_trains_the_prior_and_representation_loss_the_posterior():
    """On a single row: over several, the states carry gradients of either loss to both."""
    agent = shake(tiny_agent(free_nats=0.0))
    batch = {name: value[:, :2] for name, value in batch_of(agent).items()}
    _, world, _ = loss_parts(agent, batch)
    core = {f"rssm.{name}" for name in ("deter_in", "stoch_in", "action_in", "hidden", "hidden_norm", "gru")}
    prior, posterior = {"rssm.prior_in", "rssm.prior_logits"}, {"rssm.obs_in", "rssm.obs_logits", "encoder.vector"}
    assert gradients(agent, world.parts["dynamics_loss"], 2) == core | prior
    assert gradients(agent, world.parts["representation_loss"], 2) == core | posterior
