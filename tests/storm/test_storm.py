"""STORM's world model against the authors' arrays, published counts and numbers worked out by hand."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.storm_models import batch_of, fixture, fixture_batch, tiny_agent
from worldloom import create_world_model, get_config
from worldloom import functional as fn
from worldloom.nets import Statistics
from worldloom.optim import GuardedAdam
from worldloom.storm import STORMConfig
from worldloom.storm.behaviour import Behaviour
from worldloom.storm.losses import WorldNoise, draw_world_noise, world_losses
from worldloom.storm.transformer import segments


def near(actual, expected):
    """Equal within a hundred-thousandth of the largest expected number."""
    assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)


# Published counts


@pytest.mark.parametrize(
    ("actions", "stem", "world", "policy", "trained"),
    [(6, 791_552, 16_507_011, 1_053_702, 18_742_152), (18, 797_696, 16_513_155, 1_059_858, 18_754_452)],
)
def test_parameters_are_as_many_as_published(actions, stem, world, policy, trained):
    with torch.device("meta"):
        model = create_world_model("storm:18m", (3, 64, 64), actions, "meta")
        behaviour = Behaviour(model.config, actions, (actions,))
    parts = {
        "encoder": 690_624, "posterior": 4_195_328, "prior": 525_312, "decoder": 4_884_931, "reward": 657_151,
        "termination": 526_849, "stem": stem, "transformer": 4_201_472 + 32_768 + 1_024,
    }  # fmt: skip
    assert {name: count(getattr(model, name)) for name in parts} == parts
    assert (count(model), count(behaviour.policy), count(behaviour.value)) == (world, policy, 1_181_439)
    assert count(model, behaviour) == trained


def test_the_tiny_preset_has_as_many_parameters_as_its_table_says():
    with torch.device("meta"):
        model = create_world_model("storm:tiny", (3, 64, 64), 6, "meta")
        behaviour = Behaviour(model.config, 6, (6,))
    assert (count(model), count(behaviour.policy), count(behaviour.value)) == (1_067_235, 66_822, 98_943)


def test_the_published_preset_acts_on_the_prior_and_replays_1024_steps_for_each():
    config = get_config("storm:18m")
    assert config == dataclasses.replace(STORMConfig(), act_on="prior")
    assert config.batch_size * config.batch_length == config.train_ratio == config.imagination_starts == 1024


# The authors' arrays


@pytest.fixture(scope="module")
def update():
    """Their arrays, our model with their parameters, and its losses."""
    arrays, model = fixture()
    return arrays, model, world_losses(model, fixture_batch(arrays), WorldNoise(arrays["noise_post"], ()))


def test_latents_and_predictions_are_the_authors(update):
    arrays, model, _ = update
    log_q, z = model.see({"obs": arrays["obs"]}, arrays["noise_post"], Statistics())
    near(log_q, arrays["post_logits"])
    near(z, arrays["latent"])  # a draw is 1 or 0, so this checks every choice
    tokens = model.token(z, F.one_hot(arrays["action"].long(), 6).float())
    near(tokens, arrays["tokens"])
    _, positions, allowed = segments(torch.zeros(4, 8, dtype=torch.bool))
    h = model.transformer(tokens, positions, allowed)
    near(h, arrays["dist_feat"])
    near(model.log_probs(model.prior(h)), arrays["prior_logits"])
    near(model.reward(h), arrays["reward_logits"])
    near(model.expected(model.reward(h)), arrays["reward_decoded"])
    near(model.termination(h).squeeze(-1), arrays["termination_logits"])
    near(model.decoder(z, Statistics())["obs"][..., ::4, ::4], arrays["obs_hat"])


def test_losses_and_the_norm_of_the_gradient_are_the_authors(update):
    arrays, model, found = update
    for name in ("reconstruction", "reward", "termination", "dynamics", "representation"):
        near(found.parts[f"{name}_loss"], arrays[f"loss/{name}"])
    near(found.total, arrays["loss/total"])
    near(found.total, torch.tensor(2668.79248046 + 5.75475788 + 0.65406984 + 0.6 * 17.8918324))
    gradients = torch.autograd.grad(found.total, list(model.parameters()), retain_graph=True)
    near(torch.stack([g.norm() for g in gradients]).norm(), arrays["grad_norm"])


def test_the_first_step_of_the_optimiser_is_clipped_adam():
    arrays, model = fixture()
    parameters, c = list(model.parameters()), model.config
    before = [p.detach().double().clone() for p in parameters]

    def total():
        return world_losses(model, fixture_batch(arrays), WorldNoise(arrays["noise_post"], ())).total

    gradients = [g.double() for g in torch.autograd.grad(total(), parameters)]
    shrink = c.world_clip / float(arrays["grad_norm"])
    assert shrink < 0.15  # the limit of 1000 is reached
    made, _ = GuardedAdam([{"params": parameters}], c.world_lr, c.world_eps, c.world_clip).step(total())
    assert made
    for p, old, g in zip(parameters, before, gradients, strict=True):
        change = c.world_lr * shrink * g / (shrink * g.abs() + c.world_eps)  # both running means are debiased
        assert_close(old - p.detach().double(), change, rtol=0, atol=1e-6)


def test_running_statistics_move_a_tenth_of_the_way_to_the_batch(update):
    arrays, model, found = update
    norm = model.encoder.image.norms[0]
    maps = F.conv2d(arrays["obs"].flatten(0, 1) / 255, model.encoder.image.convs[0].weight, stride=2, padding=1)
    mean, var = maps.mean((0, 2, 3)), maps.var((0, 2, 3))  # unbiased
    old_mean, old_var = norm.running_mean.clone(), norm.running_var.clone()
    assert_close(old_mean, arrays["world/encoder.backbone.1.running_mean"])  # the losses changed nothing
    model.move_statistics(found.seen, torch.tensor(False))
    assert torch.equal(norm.running_mean, old_mean)
    model.move_statistics(found.seen, torch.tensor(True))
    assert_close(norm.running_mean, 0.9 * old_mean + 0.1 * mean)
    assert_close(norm.running_var, 0.9 * old_var + 0.1 * var)


# Losses


def test_a_lost_life_counts_as_an_end_in_an_episode_that_goes_on():
    agent = tiny_agent()
    batch, noise = batch_of(agent), draw_world_noise(agent.world_model, 4, 6)
    lost = torch.zeros(4, 7, dtype=torch.bool)
    lost[0, 2] = True
    losses = [
        world_losses(agent.world_model, {**batch, **flags}, noise).parts["termination_loss"].item()
        for flags in ({}, {"life_lost": lost}, {"terminated": lost}, {"terminated": lost, "life_lost": lost})
    ]
    assert losses[0] != losses[1] == losses[2] == losses[3]
    staged = agent.learning.stage({**batch, "life_lost": lost})
    assert torch.equal(staged["life_lost"], lost)


def test_gradients_of_each_loss_reach_what_they_should(update):
    _, model, found = update
    parts = ("encoder", "posterior", "stem", "transformer", "prior", "decoder", "reward", "termination")
    reached = {
        "reconstruction_loss": {"encoder", "posterior", "decoder"},
        "reward_loss": {"encoder", "posterior", "stem", "transformer", "reward"},
        "termination_loss": {"encoder", "posterior", "stem", "transformer", "termination"},
        "dynamics_loss": {"encoder", "posterior", "stem", "transformer", "prior"},
        "representation_loss": {"encoder", "posterior"},
    }
    for name, expected in reached.items():
        gradients = {
            part: torch.autograd.grad(
                found.parts[name], list(getattr(model, part).parameters()), retain_graph=True, allow_unused=True
            )
            for part in parts
        }
        assert {part for part, all_ in gradients.items() if any(g is not None and g.any() for g in all_)} == expected


@pytest.mark.parametrize(("scale", "floored"), [(0.17, True), (0.2, False)])
def test_free_bits_are_taken_off_the_mean_of_the_batch(scale, floored):
    arrays, model = fixture()
    with torch.no_grad():
        for latent in (model.posterior, model.prior):
            latent.weight.mul_(scale)
    kl = row_kl(model, arrays)
    assert (kl < 1).any()
    assert (kl > 1).any()  # so a floor for each row would give another number
    found = world_losses(model, fixture_batch(arrays), WorldNoise(arrays["noise_post"], ())).parts["dynamics_loss"]
    assert_close(found, kl.mean().clamp(min=1.0))
    assert bool(found == 1) == floored
    (gradient,) = torch.autograd.grad(found, model.prior.weight)
    assert bool(gradient.any()) != floored


def row_kl(model, arrays):
    """The KL [4, 7] of every row that has one, from plain formulas."""
    log_q, z = model.see({"obs": arrays["obs"]}, arrays["noise_post"], Statistics())
    _, positions, allowed = segments(torch.zeros(4, 8, dtype=torch.bool))
    h = model.transformer(model.token(z, F.one_hot(arrays["action"].long(), 6).float()), positions, allowed)
    log_p = model.log_probs(model.prior(h))
    return (log_q[:, 1:].exp() * (log_q[:, 1:] - log_p[:, :-1])).sum((-2, -1)).detach()


def test_two_hot_bins_are_even_in_symlog_space():
    model = tiny_agent().world_model
    assert_close(model.bins.diff(), torch.full((254,), 0.157480315), rtol=0, atol=2e-6)
    assert_close(model.expected(torch.zeros(255)), torch.tensor(0.0), rtol=0, atol=1e-7)
    values = torch.tensor([-1000.0, -1.0, 0.0, 0.3, 10_000.0])
    logits = torch.log(fn.two_hot(fn.symlog(values), model.bins))
    assert_close(model.expected(logits), values, rtol=1e-4, atol=1e-5)


def test_dropout_scales_what_it_keeps():
    model = tiny_agent(dropout=0.5).world_model
    batch = batch_of(tiny_agent())
    noise = draw_world_noise(model, 4, 6)
    assert len(noise.dropped) == 2
    assert 0.3 < noise.dropped[0].weights.float().mean() < 0.7
    everything = [dataclasses.replace(d, mixed=torch.ones_like(d.mixed), fed=torch.ones_like(d.fed))
                  for d in noise.dropped]  # fmt: skip
    whole = world_losses(model, batch, WorldNoise(noise.posterior, ())).parts["reward_loss"]
    some = world_losses(model, batch, noise).parts["reward_loss"]
    assert whole != some
    tokens = torch.randn(4, 6, 32)
    _, positions, allowed = segments(torch.zeros(4, 6, dtype=torch.bool))
    x = model.transformer.embed(tokens, positions)
    for block in model.transformer.blocks:  # where nothing is added, norms alone remain
        x = block.feed_norm(block.mix_norm(x))
    assert_close(model.transformer(tokens, positions, allowed, everything), x)
    kept = torch.zeros_like(noise.dropped[0].mixed)
    doubled = block.finish(x, tokens, dataclasses.replace(noise.dropped[0], mixed=kept, fed=torch.ones_like(kept)))
    assert_close(doubled, block.feed_norm(block.mix_norm(2 * block.mix(tokens) + x)))


# Episode borders


def crossing(agent, row=3):
    """A batch of 7 rows in which all windows start an episode at `row`, and noise for it."""
    batch = batch_of(agent)
    batch["is_first"] = torch.zeros(4, 7, dtype=torch.bool)
    batch["is_first"][:, row] = True
    return batch, draw_world_noise(agent.world_model, 4, 6)


def test_losses_of_a_window_over_a_border_are_those_of_its_episodes():
    agent = tiny_agent(dropout=0.0)
    batch, noise = crossing(agent)

    def part(begin, end):
        rows = {name: value[:, begin:end] for name, value in batch.items()}
        found = world_losses(agent.world_model, rows, WorldNoise(noise.posterior[:, begin : end - 1], ()))
        return torch.stack([found.parts["reward_loss"], found.parts["termination_loss"]])

    later = part(2, 7)
    assert_close(6 * part(0, 7), 2 * part(0, 3) + 4 * later)
    batch["obs"][:, 2], batch["actions"][:, 3] = 5.0, 5.0  # before the border, and an action that led nowhere
    assert torch.equal(part(2, 7), later)


def test_what_comes_before_a_border_does_not_matter_after_it():
    agent = tiny_agent(dropout=0.0)
    model, (batch, noise) = agent.world_model, crossing(agent)
    kl = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        batch["obs"][:, :3], batch["actions"][:, 1:4] = torch.randn(4, 3, 3), torch.randn(4, 3, 2)
        _, z = model.see({"obs": batch["obs"][:, :-1]}, noise.posterior)
        first = batch["is_first"][:, 1:]
        _, positions, allowed = segments(first)
        h = model.transformer(model.token(z, batch["actions"][:, 1:], first), positions, allowed)
        kl.append(h)
    assert not torch.equal(kl[0][:, :2], kl[1][:, :2])
    assert torch.equal(kl[0][:, 2:], kl[1][:, 2:])
    assert_close(h[:, 2], model.initial_state(4).deterministic)  # the zero token, alone, at the first position


def test_segments_are_numbered_and_count_their_own_positions():
    first = torch.tensor([[False, False, True, False, True, False]])
    number, positions, allowed = segments(first)
    assert number.tolist() == [[0, 0, 1, 1, 2, 2]]
    assert positions.tolist() == [[0, 1, 0, 1, 0, 1]]
    expected = torch.block_diag(*[torch.ones(2, 2).tril()] * 3).bool()
    assert torch.equal(allowed[0, 0], expected)


def test_the_last_row_of_a_window_gives_no_frame_but_its_reward_and_end():
    agent = tiny_agent((3, 64, 64))
    batch, noise = batch_of(agent), draw_world_noise(agent.world_model, 4, 6)

    def total(**changed):
        return world_losses(agent.world_model, {**batch, **changed}, noise).total

    obs, rewards = batch["obs"].clone(), batch["rewards"].clone()
    obs[:, -1], rewards[:, -1] = 0, 7.0
    assert total(obs=obs) == total()
    assert total(rewards=rewards) != total()
    rewards = batch["rewards"].clone()
    rewards[:, 0] = 7.0  # the reward for arriving at the row of context
    assert total(rewards=rewards) == total()


# What is refused


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"context": 60}, "agent.imagination_length is 16, expected with context=60 at most max_length=64"),
        ({"batch_length": 65}, "agent.batch_length is 65, expected at most max_length=64"),
        ({"acting_context": 65}, "agent.acting_context is 65, expected at most max_length=64"),
        ({"heads": 7}, "agent.hidden is 512, expected a multiple of heads=7"),
        ({"bins": 254}, "agent.bins is 254, expected an odd number"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        STORMConfig(**fields)


@pytest.mark.parametrize("rows", [2, 18])
def test_batches_that_are_too_short_or_too_long_are_refused(rows):
    agent = tiny_agent()
    batch = {name: value.repeat_interleave(3, 1)[:, :rows] for name, value in batch_of(agent).items()}
    with pytest.raises(ValueError, match=f"the batch has {rows} rows, expected 3 to 17"):
        agent.world_model.compute_loss(batch)


def test_images_whose_sides_cannot_be_halved_are_refused():
    with pytest.raises(ValueError, match="expected sides that are halved four times"):
        create_world_model("storm:tiny", (3, 84, 84), 4)


def test_compute_loss_leaves_running_statistics_until_targets_are_updated():
    model = tiny_agent((3, 64, 64)).world_model
    norm = model.decoder.image.norms[-1]
    model.compute_loss(batch_of(tiny_agent((3, 64, 64))))
    assert not norm.running_mean.any()
    model.update_targets()
    assert norm.running_mean.any()
    moved = norm.running_mean.clone()
    model.update_targets()  # there is nothing new to move to
    assert torch.equal(norm.running_mean, moved)
