"""DIAMOND's agent and world model: the contract of a family, updates, borders of episodes, imagination, refusals."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from tests.diamond_models import ACTIONS, SHAPE, batch_of, shake, tiny_agent
from worldloom import create_agent, create_world_model, get_config
from worldloom.diamond import DiamondConfig
from worldloom.diamond.actor_critic import Imagined, behaviour_losses
from worldloom.diamond.rows import Rows
from worldloom.encoding import pack, unpack
from worldloom.imagination import open_loop
from worldloom.testing import check_family

IMAGE, CHOICE = spaces.Box(0, 255, (16, 16, 3), np.uint8), spaces.Discrete(ACTIONS)
FIRST = np.array([True, True])


def parameters(agent):
    return [*agent.world_model.parameters(), *agent.behaviour.parameters()]


def copied(agent):
    return [p.detach().clone() for p in parameters(agent)]


def images(count=2, seed=0):
    return np.random.default_rng(seed).integers(256, size=(count, *SHAPE), dtype=np.uint8)


def test_the_tiny_preset_holds_what_is_asked_of_a_family():
    assert not [line for line in check_family("diamond:tiny", IMAGE, CHOICE) if line.wrong]


def test_diamond_learns_a_task_of_two_states():
    fields = {
        "cond": 8, "channels": 8, "levels": 1, "reward_cond": 8, "reward_channels": 8, "reward_levels": 1,
        "reward_lstm": 16, "policy_lstm": 16, "horizon": 2, "sampler_steps": 1, "warmup": 20, "lr": 5e-3, "gamma": 0.2,
    }  # fmt: skip
    image = spaces.Box(0, 255, (4, 4, 3), np.uint8)
    found = check_family("diamond:tiny", image, spaces.Discrete(2), updates=150, **fields)
    assert found[-1].name == "beats chance"


def test_the_atari_preset_has_the_published_settings():
    config = get_config("diamond")
    assert config == get_config("diamond:atari") == DiamondConfig()
    assert (config.window, config.denoised_rows, config.train_ratio) == (19, 6, 4 * 32 * 19)


# Updates


def test_a_resumed_agent_goes_on_exactly():
    agent = shake(tiny_agent())
    batches = [batch_of(agent, seed) for seed in range(4)]
    for batch in batches[:2]:
        agent.update(batch)
    other = tiny_agent(seed=1)
    other.load_state_dict(unpack(pack(agent.state_dict())))
    for batch in batches[2:]:
        assert agent.update(batch) == other.update(batch)
    assert all(torch.equal(a, b) for a, b in zip(parameters(agent), parameters(other), strict=True))
    obs = images()
    assert (agent.act(obs, None, FIRST)[0] == other.act(obs, None, FIRST)[0]).all()


def test_an_update_that_is_not_finite_changes_nothing():
    agent = shake(tiny_agent())
    for seed in range(2):
        agent.update(batch_of(agent, seed))
    before, state = copied(agent), agent.learning.state_dict()["optimizer"]["state"]
    moments = [value.clone() for each in state.values() for value in each.values()]
    broken = batch_of(agent)
    broken["obs"] = broken["obs"] / 255
    broken["obs"][0, 3, 0, 0, 0] = math.nan
    assert agent.update(broken)[0] == {"skipped_updates": 1.0}
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(agent), strict=True))
    state = agent.learning.state_dict()["optimizer"]["state"]
    after = [value for each in state.values() for value in each.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    agent.update(batch_of(agent))
    assert not all(torch.equal(a, b) for a, b in zip(before, parameters(agent), strict=True))


def test_each_part_learns_from_its_own_loss_alone():
    agent = shake(tiny_agent())
    learning, model = agent.learning, agent.world_model
    rows = model.rows(batch_of(agent))
    noise = learning.draw_noise(agent.batch_size)
    _, scalars = learning.loss(rows, *noise)
    parts = {"denoiser": model.denoiser, "reward_end": model.reward_end, "policy": agent.behaviour}
    reached = {
        "denoising_loss": "denoiser", "reward_loss": "reward_end", "end_loss": "reward_end", "policy_loss": "policy",
        "value_loss": "policy",
    }  # fmt: skip
    for loss, owner in reached.items():
        for name, part in parts.items():
            grads = torch.autograd.grad(scalars[loss], list(part.parameters()), retain_graph=True, allow_unused=True)
            moved = any(grad is not None and grad.any() for grad in grads)
            assert moved == (name == owner), (loss, name)


def test_the_loss_is_the_sum_of_its_parts():
    agent = shake(tiny_agent(value_scale=0.5))
    metrics, _ = agent.update(batch_of(agent))
    scales = {"denoising_loss": 1, "reward_loss": 1, "end_loss": 1, "policy_loss": 1, "value_loss": 0.5}
    assert metrics["loss"] == pytest.approx(sum(scale * metrics[name] for name, scale in scales.items()), rel=1e-5)


def test_the_first_update_changes_nothing_and_a_fresh_agent_knows_nothing():
    agent = tiny_agent()
    before = copied(agent)
    metrics, _ = agent.update(batch_of(agent))
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(agent), strict=True))
    assert metrics["policy_entropy"] == pytest.approx(math.log(ACTIONS))
    assert metrics["value"] == 0


# Borders of episodes


def rows_of(count=8, border=None, ended=()):
    """Rows whose frames are their row numbers; a new episode begins at `border`."""
    first, ends = torch.zeros(1, count, dtype=torch.bool), torch.zeros(1, count, dtype=torch.bool)
    if border is not None:
        first[0, border] = True
    ends[0, list(ended)] = True
    numbers = torch.arange(count).view(1, count, 1, 1, 1).float() + 1
    return Rows(numbers, torch.arange(count).view(1, -1) + 10, torch.zeros(1, count), ends, ends, first)


def test_imagination_starts_from_n_rows_of_one_episode_and_not_where_it_ended():
    found = set()
    for share in torch.linspace(0, 0.999, 50):
        frames, moves = rows_of(border=4, ended=[3, 7]).draw_start(share.view(1), 3)
        found.add((tuple(frames.flatten().int().tolist()), tuple(moves.flatten().tolist())))
    assert found == {  # rows 3, 4, 5 and 6 are the last of three; 3 and 7 ended, so the row before is
        ((1, 2, 3), (11, 12)),
        ((0, 0, 5), (0, 0)),
        ((0, 5, 6), (0, 15)),
        ((5, 6, 7), (15, 16)),
    }


def test_the_denoiser_takes_every_stretch_of_a_window_equally_often():
    shares = (torch.arange(600) + 0.5) / 600
    starts = [int(rows_of(8).draw_stretch(share.view(1), 6)[0][0, 0]) for share in shares]
    assert [starts.count(number) for number in (1, 2, 3)] == [200, 200, 200]


def test_a_new_episode_starts_the_model_of_rewards_from_zeros_and_a_grey_frame():
    agent = shake(tiny_agent())
    model = agent.world_model.reward_end
    frames, actions = torch.rand(2, 6, *SHAPE), torch.randint(ACTIONS, (2, 5))
    first = torch.zeros(2, 5, dtype=torch.bool)
    first[:, 2] = True
    hidden, _ = model.unroll(frames, actions, first)
    grey, none = torch.zeros_like(frames[:, :1]), torch.zeros(2, 1, dtype=torch.long)
    after = torch.cat([grey, frames[:, 3:]], 1), torch.cat([none, actions[:, 3:]], 1)
    alone, _ = model.unroll(*after, torch.zeros(2, 3, dtype=torch.bool))
    torch.testing.assert_close(hidden[:, 2:], alone)


def test_no_reward_is_learned_for_the_move_into_a_new_episode():
    agent = shake(tiny_agent())
    batch = batch_of(agent)
    noise = agent.world_model.denoiser.draw_noise(agent.batch_size, None)
    losses = []
    for reward, row in [(0.0, 4), (1.0, 4), (1.0, 5)]:
        batch["rewards"][1] = 0
        batch["rewards"][1, row] = reward
        losses.append(agent.world_model.losses(agent.world_model.rows(batch), noise)["reward_loss"].item())
    assert losses[0] == losses[1] != losses[2]


def test_imagined_frames_follow_from_the_last_frames_and_the_actions_between_them(monkeypatch):
    agent = shake(tiny_agent())
    model, learning = agent.world_model, agent.learning
    asked = []

    def sample(context, actions, noise):
        asked.append((context, actions))
        return [torch.full_like(context[:, 0], 0.1 * len(asked))]

    monkeypatch.setattr(model.denoiser, "sample", sample)
    rows = model.rows(batch_of(agent))
    _, noise = learning.draw_noise(agent.batch_size)
    imagined = learning.imagine(rows, noise)
    frames, moves = rows.draw_start(noise.rows, 4)
    chosen = torch.cat([moves, imagined.actions.argmax(-1).T], 1)
    whole = torch.cat([frames, imagined.frames[1:].transpose(0, 1)], 1)
    assert imagined.frames[1:, 0, 0, 0, 0].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert torch.equal(imagined.frames[0], frames[:, -1])
    for step, (context, actions) in enumerate(asked):
        assert torch.equal(context, whole[:, step : step + 4])
        assert torch.equal(actions, chosen[:, step : step + 4])
    before, _ = agent.behaviour.unroll(frames[:, :-1].transpose(0, 1), agent.behaviour.lstm.initial(4))
    torch.testing.assert_close(imagined.memory[0], before[-1])
    hidden, _ = model.reward_end.unroll(whole, chosen, torch.zeros_like(chosen, dtype=torch.bool))
    outcome = model.reward_end.outcome(hidden[:, 3:].transpose(0, 1))
    rewards, ends = outcome.draw(noise.reward, noise.end)
    assert torch.equal(rewards, imagined.rewards)
    assert torch.equal(ends, imagined.ends)


def test_steps_after_an_imagined_end_do_not_count():
    agent = shake(tiny_agent(), 0.2)
    lanes, steps = 3, 4
    torch.manual_seed(3)
    ends = torch.zeros(steps, lanes)
    ends[1, 0] = ends[0, 2] = 1
    frames = torch.rand(steps + 1, lanes, *SHAPE) * 2 - 1
    actions = torch.eye(ACTIONS)[torch.randint(ACTIONS, (steps, lanes))]
    rewards = torch.randint(-1, 2, (steps, lanes)).float()
    memory = agent.behaviour.lstm.initial(lanes)
    imagined = Imagined(memory, frames, actions, rewards, ends)
    expected = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 0], [0, 1, 0]]) / 7
    torch.testing.assert_close(imagined.weights(), expected)
    counted = expected > 0
    ignored = (
        torch.where(torch.cat([counted[:1], counted])[..., None, None, None], frames, 0.5),
        torch.where(counted[..., None], actions, actions.roll(1, -1)),
        torch.where(counted, rewards, rewards + 5),
    )
    others = Imagined(memory, *ignored, ends)
    first, second = (behaviour_losses(agent.behaviour, each, agent.config)[0] for each in (imagined, others))
    for name in first:
        torch.testing.assert_close(first[name], second[name])


# The world model


def test_predictions_are_frames_at_grey_levels_and_observations_are_kept():
    model = shake(tiny_agent()).world_model
    obs, action = torch.from_numpy(images()), torch.eye(ACTIONS)[[1, 2]]
    state = model.encode(obs[:2])
    seen = model.observe(state, action, torch.from_numpy(images(seed=1)))
    torch.testing.assert_close(model.decode(seen)["obs"] * 255, torch.from_numpy(images(seed=1)).float())
    assert seen.memory["actions"].tolist() == [[0, 0, 1], [0, 0, 2]]
    torch.testing.assert_close(seen.memory["frames"][:, -2], state.memory["frames"][:, -1])
    assert not state.memory["frames"][:, :-1].any()
    predicted = model.predict(seen, action)
    levels = model.decode(predicted)["obs"] * 255
    assert (levels - levels.round()).abs().max() < 1e-3
    assert levels.std() > 1
    assert predicted.features.shape == (2, 64)


def test_a_state_to_which_no_move_led_has_no_reward_and_goes_on():
    model = shake(tiny_agent()).world_model
    obs, action = torch.from_numpy(images()), torch.eye(ACTIONS)[[0] * len(images())]
    for state in (model.encode(obs), model.initial_state(2)):
        told = model.decode(state)
        assert told["reward"].tolist() == [[0.0]] * state.batch_size
        assert told["continue"].tolist() == [[1.0]] * state.batch_size
    moved = model.decode(model.observe(model.encode(obs), action, obs))
    assert moved["reward"].all()
    assert (moved["continue"] < 1).all()


def test_an_imagined_trajectory_is_predictions_in_a_row():
    model = shake(tiny_agent()).world_model
    state, actions = model.encode(torch.from_numpy(images())), torch.eye(ACTIONS)[torch.tensor([[0, 1], [2, 1]])]
    torch.manual_seed(0)
    dream = model.imagine(state, actions)
    torch.manual_seed(0)
    for action, later, reward in zip(actions, dream.states[1:], dream.rewards, strict=True):
        state = model.predict(state, action)
        assert torch.equal(state.memory["frames"], later.memory["frames"])
        torch.testing.assert_close(model.decode(state)["reward"], reward)
    assert ((dream.rewards.abs() <= 1) & (dream.continues >= 0) & (dream.continues <= 1)).all()


def test_an_open_loop_draws_its_own_numbers():
    model = shake(tiny_agent()).world_model
    obs, actions = images(8), np.eye(ACTIONS, dtype=np.float32)[[0, 1, 2, 0, 1, 2, 0, 1]]
    loops = [open_loop(model, obs, actions, np.zeros(8), 5, seed) for seed in (1, 1, 2)]
    same, other = loops[0].predicted["obs"], loops[2].predicted["obs"]
    np.testing.assert_array_equal(same, loops[1].predicted["obs"])
    np.testing.assert_allclose(same[:5], obs[:5] / 255, atol=1e-6)
    assert (same[5:] != other[5:]).any()


# Acting


def test_acting_remembers_until_an_episode_begins():
    agent = shake(tiny_agent(), 0.3)
    obs = images()
    _, state = agent.act(obs, None, FIRST)
    _, later = agent.act(obs, state, np.array([True, False]))
    torch.testing.assert_close(later["hidden"][0], state["hidden"][0])
    assert (later["hidden"][1] - state["hidden"][1]).abs().max() > 1e-3


def test_exploring_takes_a_uniform_action_now_and_then():
    obs, first = images(400), np.ones(400, bool)
    shares = {}
    for epsilon in (0.0, 1.0):
        agent = tiny_agent(epsilon=epsilon)
        with torch.no_grad():
            agent.behaviour.actor.bias[2] = 20.0  # the policy always takes the last action
        for explore in (False, True):
            shares[epsilon, explore] = agent.act(obs, None, first, explore)[0].mean(0)
    for key in [(0.0, False), (0.0, True), (1.0, False)]:
        assert shares[key][2] == 1, key
    assert shares[1.0, True] == pytest.approx([1 / 3] * 3, abs=0.1)


# Refusals


@pytest.mark.parametrize(
    ("observation", "action", "sentence"),
    [
        (spaces.Box(-1, 1, (3,), np.float32), CHOICE, r"obs_shape is \(3,\), but DIAMOND reads one square image"),
        (spaces.Dict({"a": IMAGE, "b": IMAGE}), CHOICE, "but DIAMOND reads one square image"),
        (spaces.Box(0, 255, (16, 32, 3), np.uint8), CHOICE, r"\(3, 16, 32\), but DIAMOND reads one square image"),
        (spaces.Box(0, 255, (18, 18, 3), np.uint8), CHOICE, "env.image_size to a multiple of 4"),
        (IMAGE, spaces.Box(-1, 1, (2,)), "one choice of actions .Discrete., and this environment has continuous"),
        (IMAGE, spaces.MultiDiscrete([3, 2]), "this environment has 2 choices at once"),
    ],
)
def test_other_spaces_are_refused_in_a_sentence(observation, action, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_agent("diamond:tiny", observation, action)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"channels": 56}, "agent.channels is 56, expected a multiple of 8 that makes equal groups"),
        ({"cond": 20}, "agent.cond is 20, expected a multiple of 2 context = 8"),
        ({"horizon": 1}, "agent.horizon is 1, expected at least 1 . autoregressive = 2"),
        ({"context": 1}, "agent.context is 1, expected at least 2"),
        ({"sampler_high": 1e-3}, "agent.sampler_high is 0.001, expected at least sampler_low=0.002"),
        ({"sampler_order": 3}, "agent.sampler_order is 3, expected 1 or 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_world_model("diamond:tiny", SHAPE, ACTIONS, **fields)


def test_batches_and_observations_of_other_shapes_are_refused():
    agent = tiny_agent()
    with pytest.raises(ValueError, match="the batch has 7 rows, expected 9: agent.context and agent.horizon"):
        agent.update(batch_of(agent, rows=7))
    with pytest.raises(ValueError, match="the batch has 5 rows, expected at least 6"):
        agent.world_model.compute_loss(batch_of(agent, rows=5))
    assert set(agent.world_model.compute_loss(batch_of(agent, rows=6))) == {
        "loss",
        "denoising_loss",
        "reward_loss",
        "end_loss",
    }
    with pytest.raises(ValueError, match="act: obs is a mapping"):
        agent.act({"obs": images()}, None, FIRST)
    with pytest.raises(ValueError, match="act_state has 2 rows and obs 3"):
        agent.act(images(3), agent.act(images(), None, FIRST)[1], np.ones(3, bool))
    with pytest.raises(ValueError, match=r"batch.'rewards'. is \(4, 3\), expected \(4, 9\)"):
        agent.update({**batch_of(agent), "rewards": torch.zeros(4, 3)})
