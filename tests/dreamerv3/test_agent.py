"""The DreamerV3 agent: its update, how it acts, and the library around it."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.dreamerv3_models import MIXED, batch_of, close, shake, tiny_agent
from worldloom import create_agent, create_world_model
from worldloom.dreamerv3.encoder import Decoder
from worldloom.dreamerv3.latents import compact, expand
from worldloom.dreamerv3.rssm import RSSMState
from worldloom.families import resolve
from worldloom.observations import flat_vectors

# The update


@pytest.mark.parametrize("classes", [(), (3,), (2, 2)])
@pytest.mark.parametrize("obs_shape", [(3,), (3, 64, 64), MIXED])
def test_update_learns_and_gives_fresh_latents_to_replay(classes, obs_shape):
    agent = tiny_agent(obs_shape, sum(classes) or 3, classes, {"goal": 5} if obs_shape is MIXED else None)
    batch = batch_of(agent)
    losses = []
    for _ in range(25):
        metrics, columns = agent.update(batch)
        losses.append(metrics["reconstruction_loss"] + metrics["reward_loss"])
    floor = 0.0 if obs_shape == (3,) else 3 * 64 * 64 / 12  # uniform pixels vary by 1/12 each, whatever is learned
    assert losses[-1] - floor < 0.9 * (losses[0] - floor)
    assert columns["deter"].shape == (4, 8, 32)
    assert columns["stoch"].shape == (4, 8, 4)
    assert (columns["deter"] != batch["deter"][:, 1:].numpy()).any()


def test_metrics_show_the_size_of_updates_and_the_entropies_of_latents():
    agent = tiny_agent()
    trained = [p for p in [*agent.world_model.parameters(), *agent.behaviour.parameters()] if p.requires_grad]
    for _ in range(2):
        before = torch.cat([p.detach().flatten().clone() for p in trained])
        metrics, _ = agent.update(batch_of(agent))
        moved = (torch.cat([p.detach().flatten() for p in trained]) - before).norm().item()
        assert metrics["update_norm"] == pytest.approx(moved, rel=1e-3)
    assert metrics["update_norm"] > 0
    most = 4 * math.log(4)  # four choices of four
    assert 0 < metrics["posterior_entropy"] < most
    assert 0 < metrics["prior_entropy"] < most


def test_latents_survive_the_compact_form_of_replay():
    torch.manual_seed(0)
    state = RSSMState(torch.randn(2, 32).to(torch.bfloat16).float(), torch.eye(4)[torch.randint(4, (2, 4))])
    back = compact(state)
    restored = expand(back["deter"], back["stoch"], 4)
    assert torch.equal(restored.deter, state.deter)
    assert torch.equal(restored.stoch, state.stoch)


def test_stored_latents_are_the_context_of_the_next_window():
    """Filtering rows 1..8 from row 0's stored latents gives what was written back; so does 5..8 from row 4's."""
    agent = shake(tiny_agent(lr=1e-30))  # the parameters stay
    model, batch = agent.world_model, batch_of(agent)
    batch["is_first"][1, 6] = True
    generator = agent.learning.generator.get_state()
    noise = agent.learning.draw_noise(4, 8).posterior
    agent.learning.generator.set_state(generator)
    _, columns = agent.update(batch)
    written = expand(torch.from_numpy(columns["deter"]), torch.from_numpy(columns["stoch"]), 4)  # of rows 1..8
    for row, context in (
        (0, expand(batch["deter"][:, 0], batch["stoch"][:, 0], 4)),
        (4, RSSMState(written.deter[:, 3], written.stoch[:, 3])),
    ):
        given = (batch["actions"], model.encoder({"obs": batch["obs"]}), batch["is_first"])
        rows = [value[:, row + 1 :].transpose(0, 1) for value in given]
        states = model.rssm.observe(context, *rows, noise[row:]).states.detach()
        assert_close(written.deter[:, row:], states.deter.transpose(0, 1), rtol=0.01, atol=0.01)  # bfloat16
        assert_close(written.stoch[:, row:], states.stoch.transpose(0, 1))


def test_slow_critic_follows_after_the_step():
    agent = shake(tiny_agent())
    slow, online = agent.behaviour.slow_value, agent.behaviour.value
    before = [p.clone() for p in slow.parameters()]
    agent.update(batch_of(agent))
    for old, now, target in zip(before, slow.parameters(), online.parameters(), strict=True):
        assert_close(now, 0.98 * old + 0.02 * target)


def test_slow_critic_of_a_constant_critic_equals_golden_values():
    agent = tiny_agent(lr=1e-30)
    slow, online = agent.behaviour.slow_value.parameters(), agent.behaviour.value.parameters()
    slow = [p.fill_(0.0) for p in slow]
    with torch.no_grad():
        for parameter in online:
            parameter.fill_(1.0)
    for expected in (0.02, 0.0396, 0.058808):
        agent.update(batch_of(agent))
        for parameter in slow:
            assert_close(parameter, torch.full_like(parameter, expected))


# Acting


@pytest.mark.parametrize("shape", [(3,), (3, 64, 64)])
def test_acting_filters_as_learning_does(shape):
    agent = shake(tiny_agent(shape))
    model = agent.world_model
    rng, first = np.random.default_rng(0), np.zeros((5, 2), bool)
    if len(shape) == 3:
        obs = rng.integers(256, size=(5, 2, *shape), dtype=np.uint8)
        scaled = torch.from_numpy(obs).float() / 255 - 0.5
        tokens = model.encoder.image(scaled.flatten(0, 1)).view(5, 2, -1)
    else:
        obs = rng.normal(size=(5, 2, *shape)).astype(np.float32)
        tokens = model.encoder.vector(torch.sign(x := torch.from_numpy(obs)) * torch.log1p(x.abs()))
    first[0], first[3, 1] = True, True
    generator = copy.deepcopy(agent.acting_generator)
    act_state, states, actions = None, [], [np.zeros((2, 2), np.float32)]
    for t in range(5):
        action, act_state = agent.act(obs[t], act_state, first[t])
        states.append(act_state["deter"])
        actions.append(action)
    led_here = torch.from_numpy(np.stack(actions[:5]))
    led_here[torch.from_numpy(first)] = 0
    noise = []
    for _ in range(5):
        noise.append(model.draw_noise(1, 2, generator)[0])
        agent.behaviour.policy.draw_noise((2,), generator, agent.device)
    filtered = model.rssm.observe(model.rssm.initial(2), led_here, tokens, torch.from_numpy(first), torch.stack(noise))
    assert_close(torch.stack(states), filtered.states.deter, rtol=1e-5, atol=1e-6)


def test_two_environments_never_share_a_row():
    agent = shake(tiny_agent())
    both = np.array([[1.0, 2, 3], [4, 5, 6]], np.float32)
    first = np.array([True, True])
    agent.acting_generator.manual_seed(3)
    _, together = agent.act(both, None, first)
    other = both.copy()
    other[1] = 100
    agent.acting_generator.manual_seed(3)
    _, changed = agent.act(other, None, first)
    assert torch.equal(together["deter"][0], changed["deter"][0])
    assert torch.equal(together["action"][0], changed["action"][0])


def test_acting_weights_carry_the_policy_to_another_agent():
    learner, actor = shake(tiny_agent()), tiny_agent()
    actor.load_acting_weights(learner.acting_weights())
    obs, first = np.ones((2, 3), np.float32), np.array([True, True])
    np.testing.assert_array_equal(learner.act(obs, None, first)[0], actor.act(obs, None, first)[0])


def test_state_dict_resumes_bit_exactly():
    straight = shake(tiny_agent())
    straight.update(batch_of(straight))
    state = copy.deepcopy(straight.state_dict())
    expected = [straight.update(batch_of(straight, seed))[0] for seed in (2, 3)]
    resumed = tiny_agent()
    resumed.load_state_dict(state)
    assert [resumed.update(batch_of(resumed, seed))[0] for seed in (2, 3)] == expected


def everything(agent):
    """Every number that an update may change, by place; what only counts calls or draws is left out."""
    state = agent.state_dict()
    state = {name: value for name, value in state.items() if name not in ("updates", "generator")}
    leaves, _ = torch.utils._pytree.tree_flatten(state)
    return [torch.as_tensor(leaf).clone() for leaf in leaves if not isinstance(leaf, str)]


def test_an_update_with_nan_changes_nothing_and_several_in_a_row_name_the_loss():
    agent = shake(tiny_agent())
    good, bad = batch_of(agent), batch_of(agent)
    bad["obs"][0, 3] = float("nan")
    agent.update(good)
    before = everything(agent)
    metrics, _ = agent.update(bad)
    assert metrics["skipped_updates"] == 1
    assert all(torch.equal(a, b) for a, b in zip(everything(agent), before, strict=True))
    for _ in range(3):
        agent.learn(bad)
    agent.update(good)  # a good one in between: the count begins anew
    assert any(not torch.equal(a, b) for a, b in zip(everything(agent), before, strict=True))
    for _ in range(5):
        agent.learn(bad)
    with pytest.raises(FloatingPointError, match="5 updates in a row.*reconstruction_loss"):
        agent.collect()


def test_metrics_are_means_over_the_updates_since_the_last_call():
    one, two = shake(tiny_agent()), shake(tiny_agent())
    batches = [batch_of(one, seed) for seed in (1, 2, 3)]
    each = [one.update(batch)[0] for batch in batches]
    for batch in batches:
        two.learn(batch)
    mean = {name: np.mean([metrics[name] for metrics in each]) for name in each[0]}
    assert two.collect() == pytest.approx(mean, rel=1e-5)


# The library


def test_the_quick_start_prints_what_it_promises():
    model = create_world_model("dreamerv3:size12m", obs_shape=(3, 64, 64), action_dim=4)
    state = model.encode(torch.randn(1, 3, 64, 64))
    trajectory = model.imagine(state, torch.randn(15, 1, 4))
    assert list(trajectory.rewards.shape) == [15, 1, 1]
    assert len(trajectory.states) == 16
    assert ((trajectory.continues >= 0) & (trajectory.continues <= 1)).all()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("dreamer", "size12m"),
        ("dreamer-small", "size12m"),
        ("dreamer-medium", "size50m"),
        ("dreamer-large", "size200m"),
    ],
)
def test_aliases_name_a_size(name, size):
    assert resolve(name) == ("dreamerv3", size)


@pytest.mark.parametrize(("logit", "expected"), [(0.0, 0.501506024), (5.805135, 1.0), (50.0, 1.0)])
def test_shown_continues_are_free_of_the_discount(logit, expected):
    """The head learns the chance times 1 - 1/333: 0.5 stands for 0.5 * 333 / 332."""
    model = tiny_agent().world_model
    with torch.no_grad():
        model.continues.output.weight.zero_()
        model.continues.output.bias.fill_(logit)
        state = model.encode(torch.zeros(2, 3))
        trajectory = model.imagine(state, torch.zeros(3, 2, 2))
        close(model.decode(state)["continue"], [expected] * 2)
        close(trajectory.continues, [expected] * 6)


def test_mixed_observations_decode_to_their_own_shapes():
    shapes = {"image": (3, 64, 64), "speed": (2,), "height": ()}
    model = create_world_model("dreamerv3:size1m", obs_shape=shapes, action_dim=2)
    obs = {
        "image": torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8),
        "speed": torch.randn(2, 2),
        "height": torch.randn(2),
    }
    state = model.encode(obs)
    assert state.categorical.shape == (2, 32, 4)
    assert (state.categorical.argmax(-1) == state.stochastic.view(2, 32, 4).argmax(-1)).all()
    assert torch.equal(state.detach().to("cpu").categorical, state.categorical)
    decoded = model.decode(model.observe(state, torch.zeros(2, 2), obs))
    assert {name: tuple(value.shape[1:]) for name, value in decoded["obs"].items()} == shapes
    assert ((decoded["obs"]["image"] > 0) & (decoded["obs"]["image"] < 1)).all()
    with pytest.raises(ValueError, match="lacks the key 'height'"):
        model.encode({name: value for name, value in obs.items() if name != "height"})
    batch = {
        "obs": {name: value.unsqueeze(1).expand(2, 5, *value.shape[1:]) for name, value in obs.items()},
        "actions": torch.zeros(2, 5, 2),
        "rewards": torch.zeros(2, 5),
    }
    losses = model.compute_loss(batch)
    assert {
        "loss",
        "kl_loss",
        "reconstruction_loss",
        "reward_loss",
        "continue_loss",
        "reconstruction/image",
    } <= losses.keys()


def test_class_indices_are_one_hot_and_missing_entries_are_zero():
    shapes, classes = {"goal": (2,), "state": (2,)}, {"goal": 3}
    obs = {"goal": torch.tensor([[2, -1]]), "state": torch.tensor([[1.0, -math.inf]])}
    flat = flat_vectors(obs, shapes, classes)
    close(flat[0], [0, 0, 1, 0, 0, 0, math.log(2), 0])
    decoder = Decoder(shapes, classes, deter=8, stoch=6, units=4, depth=1, layers=1, blocks=2)
    decoded = {"goal": torch.tensor([[[1.0, 2, 3], [9, 9, 0]]]), "state": torch.tensor([[0.5, 7.0]])}
    losses = decoder.losses(decoded, obs)
    close(losses["goal"], [math.log(math.exp(1) + math.exp(2) + math.exp(3)) - 3])  # the missing entry costs nothing
    close(losses["state"], [(0.5 - math.log(2)) ** 2])
    assert decoder.shown("goal", decoded["goal"]).tolist() == [[2, 0]]


def test_class_indices_and_numbers_are_not_mistaken_for_one_another():
    model = create_world_model("dreamerv3:size1m", {"goal": (2,), "x": (1,)}, 2, obs_classes={"goal": 3})
    numbers, indices = torch.zeros(1, 1), torch.zeros(1, 2, dtype=torch.int64)
    model.encode({"goal": indices, "x": numbers})
    with pytest.raises(ValueError, match=r"obs 'goal' is torch.float32, expected class indices"):
        model.encode({"goal": indices.float(), "x": numbers})
    with pytest.raises(ValueError, match=r"obs 'x' is torch.int64 \(1, 1\) without a class count"):
        model.encode({"goal": indices, "x": numbers.long()})
    with pytest.raises(ValueError, match="obs_classes\\['y'\\] is 3, expected"):
        create_world_model("dreamerv3:size1m", {"x": (1,)}, 2, obs_classes={"y": 3})


def test_save_pretrained_round_trip(tmp_path):
    model = create_world_model("dreamerv3:size1m", obs_shape={"a": (3,), "b": ()}, action_dim=2)
    model.save_pretrained(tmp_path)
    loaded = create_world_model(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


@pytest.mark.parametrize("shape", [(3, 60, 60), (3, 32, 32), (3, 64, 272)])
def test_image_sides_that_cannot_be_halved_are_refused(shape):
    with pytest.raises(ValueError, match="multiples of 16 from 48 to 256"):
        create_world_model("dreamerv3:size1m", obs_shape=shape, action_dim=2)


def test_bad_settings_are_refused():
    import gymnasium

    box = gymnasium.spaces.Box(-1, 1, (3,))
    with pytest.raises(ValueError, match="replay_context is 'no', expected 'stored' or 'zeros'"):
        create_agent("dreamerv3:size1m", box, gymnasium.spaces.Discrete(2), replay_context="no")
    with pytest.raises(ValueError, match=r"agent.deter is 100, expected a multiple of blocks=8"):
        create_agent("dreamerv3:size1m", box, box, deter=100)
