"""Tests of STORM's imagination, and of what is learned from it."""

import pytest
import torch
from torch.testing import assert_close

from tests.storm_models import batch_of, tiny_agent
from worldloom.storm.behaviour import Imagined, agent_losses, lambda_returns, percentiles
from worldloom.storm.transformer import Cache, contexts, segments

CHOICES = (3,)


def agent_and_batch(**overrides):
    """An agent with three choices, of which every trained row is a start, and a batch for its update."""
    agent = tiny_agent((3,), 3, CHOICES, **{"imagination_starts": 100, **overrides})
    with torch.no_grad():
        for latent in (agent.world_model.posterior, agent.world_model.prior):
            latent.weight.mul_(5)  # so that what is drawn depends on what is read
    return agent, batch_of(agent)


def whole(model, tokens):
    """h [T, D] of one sequence of tokens [T, D] by the whole transformer."""
    place = torch.arange(len(tokens))
    return model.transformer(tokens[None], place, place[:, None] >= place)[0]


def chosen_rows(noise):
    """Window and place of each start, as the draw orders them."""
    count = noise.prior.shape[1] // len(noise.order)
    return [(b, int(t)) for b, places in enumerate(noise.order) for t in places.argsort()[:count]]


@pytest.mark.parametrize("act_on", ["prior", "posterior"])
def test_imagination_with_kept_keys_is_that_of_the_whole_transformer(act_on):
    agent, batch = agent_and_batch(act_on=act_on)
    model, c, noise = agent.world_model, agent.config, agent.learning.draw_noise(4, 6)
    found = agent.learning.imagine(batch, noise)
    assert found.features.shape == (5, 24, 48)
    assert found.actions.shape == (4, 24, 3)
    _, z = model.see({"obs": batch["obs"]}, noise.posterior)
    tokens = model.token(z[:, :-1], batch["actions"][:, 1:], batch["is_first"][:, 1:])
    number = segments(batch["is_first"][:, 1:])[0]
    latents, hidden = found.features.split([16, 32], -1)
    for n, (window, place) in enumerate(chosen_rows(noise)):
        own = [t for t in range(max(place - c.context + 1, 0), place + 1) if number[window, t] == number[window, place]]
        context = tokens[window, own]
        sequence = torch.cat([context, model.token(latents[:-1, n], found.actions[:, n])])
        h = whole(model, sequence)[len(own) - 1 :]
        assert_close(hidden[:, n], h, rtol=0, atol=2e-6)
        rewards = model.expected(model.reward(h[1:]))
        assert_close(found.rewards[:, n], rewards, rtol=0, atol=2e-6)
        ends = model.termination(h[1:]).squeeze(-1) > 0
        assert torch.equal(found.continues[:, n], c.discount * (~ends).float())
        drawn = model.draw(model.log_probs(model.prior(h)), noise.prior[:, n])
        start = drawn[0] if act_on == "prior" else z[window, place + 1]
        assert torch.equal(latents[:, n], torch.cat([start[None], drawn[1:]]))
        for t in range(c.imagination_length):
            action = agent.behaviour.policy.sample(found.features[t, n], noise.policy[t, n])
            assert torch.equal(found.actions[t, n], action)


def test_starts_are_drawn_without_repetition_from_the_trained_rows():
    agent, _ = agent_and_batch(imagination_starts=10)
    noises = [agent.learning.draw_noise(4, 6) for _ in range(2)]
    rows = [chosen_rows(noise) for noise in noises]
    assert rows[0] == [(int(i) // 6, int(i) % 6) for i in noises[0].chosen(torch.zeros(4, 6))]
    assert [window for window, _ in sorted(set(rows[0]))] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3  # 10 / 4, or more
    assert rows[0] != rows[1]


def test_nothing_is_imagined_from_the_end_of_an_episode_while_there_are_other_rows():
    agent, _ = agent_and_batch(imagination_starts=20)
    noise, ends = agent.learning.draw_noise(4, 6), torch.zeros(4, 6)
    ends[0, 2] = ends[1, 5] = 1
    found = noise.chosen(ends).view(4, 5)
    assert not {2, 11} & set(found.flatten().tolist())
    assert torch.equal(found[2:], noise.chosen(torch.zeros(4, 6)).view(4, 5)[2:])
    ends[0] = 1
    assert noise.chosen(ends).view(4, 5)[0].max() < 6  # a window without other rows gives as many


def test_contexts_hold_the_last_tokens_of_their_own_episode():
    tokens = torch.arange(12.0).view(2, 6, 1)
    number = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    found, padding = contexts(tokens, number, torch.tensor([1, 3, 5, 11]), 3)
    assert padding.tolist() == [1, 2, 0, 0]
    held = [row[int(skip) :, 0].tolist() for row, skip in zip(found, padding, strict=True)]
    assert held == [[0, 1], [3], [3, 4, 5], [9, 10, 11]]


def test_what_fills_the_places_before_an_episode_does_not_matter():
    model = tiny_agent().world_model
    tokens, padding = torch.randn(2, 4, 32), torch.tensor([0, 3])
    other = tokens.clone()
    other[1, :3] = 100.0
    a, b = (Cache(model.transformer, given, padding, 2) for given in (tokens, other))
    token = torch.randn(2, 32)
    assert_close(a.hidden, b.hidden)
    assert_close(a.append(token), b.append(token))
    alone = whole(model, torch.stack([tokens[1, 3], token[1]]))  # at the first positions
    assert_close(a.hidden[1], alone[1])


def test_imagination_reads_running_statistics_and_each_window_by_itself():
    agent = tiny_agent((3, 64, 64), 3, CHOICES, act_on="posterior", imagination_starts=100)
    with torch.no_grad():
        agent.world_model.posterior.weight.mul_(100)
    batch, noise = batch_of(agent), agent.learning.draw_noise(4, 6)
    others = [n for n, (window, _) in enumerate(chosen_rows(noise)) if window != 0]
    before = agent.learning.imagine(batch, noise)
    batch["obs"][0] = 0
    after = agent.learning.imagine(batch, noise)
    assert torch.equal(before.features[:, others], after.features[:, others])
    assert not torch.equal(before.features, after.features)


# Returns and losses


REWARDS, VALUES = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.5, 0.6, 0.7, 0.8])


@pytest.mark.parametrize(
    ("published", "ends", "expected"),
    [
        (False, [0, 0, 0], [3.503061020, 2.643346, 2.788]),
        (True, [0, 0, 0], [3.489214982, 2.633812431, 2.783075]),
        (False, [0, 1, 0], [1.02955, 0, 2.788]),
        (True, [0, 1, 0], [1.024625, 0, 2.783075]),
    ],
)
def test_returns_equal_golden_values(published, ends, expected):
    continues = 0.985 * (1 - torch.tensor(ends).float())
    found = lambda_returns(REWARDS, continues, VALUES, 0.95, published)
    assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)


def test_percentiles_are_entries_of_the_returns():
    returns = torch.randperm(30).float()
    low, high = percentiles(returns, 0.05, 0.95)
    assert (low, high) == (0, 27)  # the first and the 28th smallest
    low, high = percentiles(torch.randperm(16384).float(), 0.05, 0.95)
    assert (low, high) == (818, 15563)
    assert percentiles(torch.tensor([3.0, 5.0]), 0.05, 0.95)[0] == 3


def test_the_scale_starts_from_zero_and_is_at_least_one():
    scale = tiny_agent().behaviour.range
    low, high = scale.after(torch.arange(30.0))
    assert_close(torch.stack([low, high]), torch.tensor([0.0, 0.27]))
    assert scale.scale_of(low, high) == 1
    low, high = scale.after(1000 * torch.arange(30.0))
    assert_close(scale.scale_of(low, high), torch.tensor(270.0))


def test_policy_and_value_losses_follow_their_formulas():
    agent = tiny_agent((3,), 3, CHOICES)
    behaviour, bins, steps = agent.behaviour, agent.world_model.bins, (4, 5)
    features = torch.randn(5, 5, 48)
    actions = torch.eye(3)[torch.randint(3, steps)]
    values, slow, own = torch.randn(5, 5), torch.randn(steps), torch.randn(steps)
    imagined = Imagined(features, actions, torch.randn(steps), torch.ones(steps), values, values)
    losses, logged = agent_losses(behaviour, imagined, (own, slow), torch.tensor(2.0), bins, 0.1)
    log_probs = torch.log_softmax(behaviour.policy.logits(behaviour.policy.mlp(features[:-1])), -1)
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    taken = log_probs[actions.bool()].view(steps)
    assert_close(losses["policy_loss"], -(taken * (own - values[:-1]) / 2).mean() - 0.1 * entropy)
    assert_close(logged["policy_entropy"], entropy)
    log_values = torch.log_softmax(behaviour.value(features[:-1]), -1)
    expected = torch.zeros(())
    for target in (own, slow):
        place = (torch.sign(target) * torch.log1p(target.abs()) + 20) / 40 * 254
        lower, share = place.floor().long(), place - place.floor()
        near = (1 - share) * log_values.gather(-1, lower[..., None])[..., 0]
        expected = expected - (near + share * log_values.gather(-1, lower[..., None] + 1)[..., 0]).mean()
    assert_close(losses["value_loss"], expected, rtol=1e-5, atol=1e-5)
    losses["policy_loss"].backward()
    assert all(p.grad is None for p in behaviour.value.parameters())  # the advantage has no gradient


def test_an_update_learns_from_the_returns_of_both_critics_and_a_new_scale():
    agent, batch = agent_and_batch()
    with torch.no_grad():
        agent.behaviour.slow_value[-1].bias[150:].add_(3.0)
        agent.world_model.reward[-1].bias[160:].add_(4.0)  # so that the scale is above 1
    learning, noise = agent.learning, agent.learning.draw_noise(4, 6)
    found = learning.imagine(batch, noise)
    own, slow = (
        lambda_returns(found.rewards, found.continues, values, 0.95, False)
        for values in (found.values, found.slow_values)
    )
    low, high = percentiles(own, 0.05, 0.95)
    scale = (0.01 * (high - low)).clamp(min=1.0)
    bins, rate = agent.world_model.bins, agent.config.entropy_scale
    expected, _ = agent_losses(agent.behaviour, found, (own, slow), scale, bins, rate)
    made, _ = learning.update_agent(batch, noise, torch.tensor(True))
    assert scale > 1
    assert_close(made["return_range"], scale)
    for name, value in expected.items():
        assert_close(made[name], value)
    assert_close(agent.behaviour.range.high, 0.01 * high)


def test_the_slow_critic_follows_and_the_published_returns_are_others():
    outcomes = []
    for rule in ("paper", "published"):
        agent, batch = agent_and_batch(returns=rule, agent_lr=1e-2)
        slow, value = agent.behaviour.slow_value[0].weight, agent.behaviour.value[0].weight
        before = slow.clone()
        assert torch.equal(slow, value)
        agent.update(batch)
        assert_close(slow, before + 0.02 * (value - before), rtol=0, atol=1e-7)
        assert not torch.equal(slow, before)
        outcomes.append(value.detach().clone())
    assert not torch.equal(*outcomes)


def test_rewards_are_decoded_in_full_precision_after_products_in_bfloat16():
    agent, batch = agent_and_batch()
    place = 127 + float(torch.log1p(torch.tensor(1000.0))) / 40 * 254
    share, last = place % 1, agent.world_model.reward[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(-30.0)
        last.bias[int(place)], last.bias[int(place) + 1] = torch.log(torch.tensor([1 - share, share]))
    agent.configure_learning("bfloat16", compiled=False)
    found = agent.learning.imagine(batch, agent.learning.draw_noise(4, 6))
    assert_close(found.rewards, torch.full_like(found.rewards, 1000.0), rtol=5e-3, atol=0)  # 1029 if it were not
    assert agent.update(batch)[0]["skipped_updates"] == 0
