"""DreamerV3's behaviour: policies, imagination and returns."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.dreamerv3_models import batch_of, close, fill, loss_parts, shake, tiny_agent
from worldloom import functional as fn
from worldloom.actor_critic import policy_loss
from worldloom.dreamerv3 import DreamerV3Config
from worldloom.dreamerv3.actor_critic import (
    ContinuousPolicy,
    DiscretePolicy,
    Imagined,
    ReturnRange,
    replay_returns,
)
from worldloom.dreamerv3.rssm import RSSMState, sample_one_hot

C = 0.996996997


# Policies


def test_continuous_policy_equals_the_reference():
    policy = fill(ContinuousPolicy(6, 4, 2, 2))
    features = 0.5 * torch.sin(torch.arange(1.0, 7))
    mean, std = policy(features)
    close(mean, [0.2023210, -0.0172046], 1e-5)
    close(std, [0.9106400, 0.8910808], 1e-5)
    log_prob, entropy = policy.log_prob_and_entropy(features, torch.tensor([0.5, -2]))
    close(log_prob, [-4.158041], 1e-5)
    close(entropy, [2.628949], 1e-5)


def test_bounded_normal_of_zero_outputs_equals_golden_values():
    policy = ContinuousPolicy(6, 4, 2, 1)
    with torch.no_grad():
        for layer in (policy.mean, policy.std):
            layer.weight.zero_()
    mean, std = policy(torch.zeros(6))
    log_prob, entropy = policy.log_prob_and_entropy(torch.zeros(6), torch.tensor([0.3]))
    close(mean, [0.0])
    close(std, [0.892717370])
    close(entropy, [1.305453290])
    close(log_prob, [-0.861918968])


@pytest.mark.parametrize(("raw", "std", "expected"), [(-1e3, 0.1, -0.883646560), (1e3, 1.0, 1.418938533)])
def test_bounded_normal_keeps_its_std_and_entropy_in_the_golden_range(raw, std, expected):
    policy = ContinuousPolicy(6, 4, 2, 1)
    with torch.no_grad():
        policy.std.bias.fill_(raw)
    _, entropy = policy.log_prob_and_entropy(torch.zeros(6), torch.zeros(1))
    close(policy(torch.zeros(6))[1], [std])
    close(entropy, [expected])


def test_discrete_policy_mixes_in_a_uniform_share_and_draws_from_it():
    torch.manual_seed(0)
    policy = DiscretePolicy(6, 4, 1, (4,), unimix=0.01)
    with torch.no_grad():
        policy.logits.bias.copy_(torch.tensor([1000.0, 0, 0, 0]))
    features = torch.zeros(50_000, 6)
    close(policy(features[0])[0].exp(), [0.9925, 0.0025, 0.0025, 0.0025], 1e-5)
    drawn = policy.sample(features, policy.draw_noise((50_000,), None, torch.device("cpu")))
    assert_close(drawn.mean(0), policy(features[0])[0].exp(), rtol=0, atol=2e-3)
    log_prob, _ = policy.log_prob_and_entropy(features[:1], torch.tensor([[0.0, 1, 0, 0]]))
    close(log_prob, [math.log(0.0025)], 1e-5)


def test_multi_discrete_policy_sums_over_its_parts():
    torch.manual_seed(0)
    policy = DiscretePolicy(6, 4, 1, (2, 3), unimix=0.01)
    with torch.no_grad():
        policy.logits.weight.normal_()
    features = torch.randn(1, 6).expand(50_000, 6)
    left, right = (log_probs[0] for log_probs in policy(features))
    drawn = policy.sample(features, policy.draw_noise((50_000,), None, torch.device("cpu")))
    assert_close(drawn[:, :2].mean(0), left.exp(), rtol=0, atol=8e-3)
    assert_close(drawn[:, 2:].mean(0), right.exp(), rtol=0, atol=8e-3)
    assert_close((drawn[:, 0] * drawn[:, 4]).mean(), left[0].exp() * right[2].exp(), rtol=0, atol=8e-3)  # independent
    log_prob, entropy = policy.log_prob_and_entropy(features[:1], torch.tensor([[0.0, 1, 0, 0, 1]]))
    assert_close(log_prob[0], left[1] + right[2])
    assert_close(entropy[0], -(left.exp() * left).sum() - (right.exp() * right).sum())


def test_policy_loss_is_reinforce_without_gradient_through_the_advantage():
    log_prob, entropy, advantage = (torch.randn(5, 3, requires_grad=True) for _ in range(3))
    loss = policy_loss(log_prob, entropy, advantage, torch.full((5, 3), 0.5), 3e-4)
    loss.backward()
    assert advantage.grad is None
    assert_close(log_prob.grad, -0.5 * advantage.detach() / 15)
    assert_close(entropy.grad, torch.full((5, 3), -0.5 * 3e-4 / 15))


# Imagination


@pytest.mark.parametrize("classes", [(), (3,)])
def test_imagination_follows_the_given_noise_and_reads_every_head_at_its_features(classes):
    agent = shake(tiny_agent(action_dim=3, classes=classes))
    model, behaviour, steps = agent.world_model, agent.behaviour, agent.config.imagination_length
    noise = agent.learning.draw_noise(4, 8)
    start = RSSMState(torch.randn(32, 32), torch.eye(4)[torch.randint(4, (32, 4))])
    imagined = agent.learning.imagine(start, noise)
    features = imagined.features
    assert imagined.actions.shape == (steps + 1, 32, 3)
    assert torch.equal(features[0], torch.cat([start.deter, start.stoch.flatten(1)], -1))
    with torch.no_grad():
        for t in range(steps + 1):
            assert_close(imagined.actions[t], behaviour.policy.sample(features[t], noise.policy[t]))
        for t in range(steps):
            state = RSSMState(features[t, :, :32], features[t, :, 32:].unflatten(-1, (4, 4)))
            deter = model.rssm.core(state, model.rssm.embed_action(imagined.actions[t]))
            drawn = sample_one_hot(model.rssm.prior(deter).exp(), noise.prior[t])
            assert_close(features[t + 1], torch.cat([deter, drawn.flatten(1)], -1))
        for found, head in (
            (imagined.rewards, model.reward),
            (imagined.values, behaviour.value),
            (imagined.slow_values, behaviour.slow_value),
        ):
            assert_close(found, fn.antisymmetric_mean(head(features), model.bins))
        assert_close(imagined.continues, model.continues(features).sigmoid()[..., 0])  # with the discount inside
    assert not torch.equal(imagined.values, imagined.slow_values)


@pytest.mark.parametrize("classes", [(), (3,)])
def test_no_gradient_passes_through_imagined_actions(classes):
    """The specification's pitfall 7; learning is by REINFORCE, for continuous actions too."""
    agent = shake(tiny_agent(action_dim=3, classes=classes))
    _, world, imagined = loss_parts(agent, batch_of(agent))
    assert world.total.requires_grad
    assert not any(value.requires_grad for value in vars(imagined).values())
    if classes:
        sample = agent.behaviour.policy.sample(imagined.features, agent.learning.draw_noise(4, 8).policy)
        assert not sample.requires_grad


# Returns


def rollout(rewards, values, continues):
    def column(values):
        return torch.tensor(values, dtype=torch.float64).unsqueeze(-1)

    nothing = torch.zeros(len(rewards), 1, 1)
    return Imagined(nothing, nothing, column(rewards), column(continues), column(values), column(values))


def test_imagined_returns_pair_each_step_with_the_next_reward_continue_and_value():
    close(rollout([0, 1, 0, 2], [0.5, 0.6, 0.7, 0.8], [C] * 4).returns(0.95), [3.572650956, 2.684631478, 2.797597598])
    ended = rollout([0, 1, 0, 2], [0.5, 0.6, 0.7, 0.8], [C, C, 0, C])
    close(ended.returns(0.95), [1.029909910, 0, 2.797597598])


def test_imagination_weights_start_with_the_continue_of_the_start_itself():
    expected = [0.996996997, 0.994003012, 0.991018018, 0.988041988, 0.985074895]
    close(rollout([0] * 6, [0] * 6, [C] * 6).weights(), expected)
    assert not rollout([0] * 4, [0] * 4, [0, C, C, C]).weights().any()  # a start on a terminal state is muted


@pytest.mark.parametrize(
    ("last", "terminated", "expected"),
    [
        (None, False, (3.572650956, 2.684631478, 2.797597598)),
        (2, False, (1.690921913, 0.697897898, 2.797597598)),
        (2, True, (1.029909910, 0, 2.797597598)),
    ],
)
def test_replay_returns_equal_golden_values(last, terminated, expected):
    rewards, boot = (torch.tensor(v, dtype=torch.float64)[:, None] for v in ([0, 1, 0, 2], [0.5, 0.6, 0.7, 0.8]))
    ends, true_ends = torch.zeros_like(rewards), torch.zeros_like(rewards)
    if last:
        ends[last], true_ends[last] = 1, float(terminated)
    close(replay_returns(rewards, true_ends, ends, boot, C, 0.95), expected)


def move(scale, values):
    scale.move(*scale.after(values), torch.tensor(True))


def test_return_range_equals_golden_values():
    scale, values = ReturnRange(DreamerV3Config()), torch.linspace(0, 10, 101)
    move(scale, values)
    close(torch.stack([scale.low, scale.high, scale.scale]), [0.005, 0.095, 1.0], 1e-5)
    for update in range(2, 101):
        move(scale, values)
        assert (scale.scale > 1) == (update >= 12), update
    close(scale.scale, [5.705709], 1e-5)


def test_return_range_forgets_its_start_at_zero_slowly():
    scale = ReturnRange(DreamerV3Config())
    for expected in (0.1, 0.199, 0.29701):
        move(scale, torch.full((50,), 10.0))
        close(torch.stack([scale.low, scale.high]), [expected] * 2)
