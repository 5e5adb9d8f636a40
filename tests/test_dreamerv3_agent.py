"""DreamerV3's behaviour, its one update, and the bugs that ports of it are known for."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.test_dreamerv3 import close, fill
from worldloom import create_agent, create_world_model
from worldloom.dreamerv3 import SIZES, DreamerV3Agent, DreamerV3Config, DreamerV3WorldModel
from worldloom.dreamerv3.actor_critic import (
    ContinuousPolicy,
    DiscretePolicy,
    Imagined,
    ReturnRange,
    policy_loss,
    replay_returns,
)
from worldloom.dreamerv3.agent import Behaviour, compact, expand
from worldloom.dreamerv3.encoder import Decoder, flat_vectors
from worldloom.dreamerv3.rssm import RSSMState

C = 0.996996997
TINY = {
    "deter": 32, "hidden": 8, "units": 16, "classes": 4, "depth": 2, "stoch": 4, "blocks": 4, "batch_size": 4,
    "batch_length": 8, "imagination_length": 5, "bins": 255, "lr": 1e-3, "warmup": 0,
}  # fmt: skip


def tiny_agent(obs_shape=(3,), action_dim=2, classes=(), obs_classes=None, **overrides):
    torch.manual_seed(0)
    config = DreamerV3Config(**{**TINY, **overrides})
    model = DreamerV3WorldModel(obs_shape, action_dim, config, obs_classes=obs_classes)
    return DreamerV3Agent(model, seed=0, action_classes=classes)


def batch_of(agent, seed=1, rows=None):
    torch.manual_seed(seed)
    model, batch, length = agent.world_model, agent.batch_size, rows or agent.windows.length

    def observation(key, shape):
        if len(shape) == 3:
            return torch.randint(0, 256, (batch, length, *shape), dtype=torch.uint8)
        if key in model.obs_classes:
            return torch.randint(model.obs_classes[key], (batch, length, *shape), dtype=torch.int32)
        return torch.randn(batch, length, *shape)

    shape = model.obs_shape
    obs = {k: observation(k, s) for k, s in shape.items()} if isinstance(shape, dict) else observation("obs", shape)
    actions = torch.rand(batch, length, model.action_dim) * 2 - 1
    if agent.action_classes:
        parts = actions.split(agent.action_classes, -1)
        actions = torch.cat([F.one_hot(part.argmax(-1), part.shape[-1]).float() for part in parts], -1)
    none = torch.zeros(batch, length, dtype=torch.bool)
    made = {
        "obs": obs,
        "actions": actions,
        "rewards": torch.randn(batch, length),
        "is_first": none.clone(),
        "terminated": none.clone(),
        "truncated": none.clone(),
    }
    if agent.columns:
        state = RSSMState(torch.randn(batch, length, 32), torch.eye(4)[torch.randint(4, (batch, length, 4))])
        made |= {name: torch.from_numpy(value) for name, value in compact(state).items()}
    return made


def shake(agent, amount=0.1):
    """Give the zero-initialised outputs values."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in [*agent.world_model.parameters(), *agent.behaviour.parameters()]:
            parameter.add_(amount * torch.randn_like(parameter))
    return agent


BEHAVIOUR_COUNTS = {  # policy with 18 discrete actions, policy with 6 continuous ones, value
    "size1m": (50_706, 50_316, 66_111),
    "size12m": (792_594, 791_052, 853_503),
    "size25m": (1_778_706, 1_776_396, 1_869_951),
    "size50m": (3_158_034, 3_154_956, 3_279_615),
    "size100m": (7_096_338, 7_091_724, 7_278_591),
    "size200m": (12_607_506, 12_601_356, 12_850_431),
    "size400m": (28_348_434, 28_339_212, 28_712_703),
}


@pytest.mark.parametrize("size", SIZES)
def test_policy_and_value_counts_equal_the_reference(size):
    def counts(action_dim, classes):
        with torch.device("meta"):
            behaviour = Behaviour(DreamerV3WorldModel((4,), action_dim, DreamerV3Config(**SIZES[size])), classes)
        parts = (behaviour.policy, behaviour.value)
        return [sum(p.numel() for p in part.parameters()) for part in parts]

    discrete, continuous, value = BEHAVIOUR_COUNTS[size]
    assert counts(18, (18,)) == [discrete, value]
    assert counts(6, ()) == [continuous, value]


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


def test_return_range_equals_golden_values():
    scale, values = ReturnRange(DreamerV3Config()), torch.linspace(0, 10, 101)
    scale.update(values)
    close(torch.stack([scale.low, scale.high, scale.scale]), [0.005, 0.095, 1.0], 1e-5)
    for update in range(2, 101):
        scale.update(values)
        assert (scale.scale > 1) == (update >= 12), update
    close(scale.scale, [5.705709], 1e-5)


def test_policy_loss_is_reinforce_without_gradient_through_the_advantage():
    log_prob, entropy, advantage = (torch.randn(5, 3, requires_grad=True) for _ in range(3))
    loss = policy_loss(log_prob, entropy, advantage, torch.full((5, 3), 0.5), 3e-4)
    loss.backward()
    assert advantage.grad is None
    assert_close(log_prob.grad, -0.5 * advantage.detach() / 15)
    assert_close(entropy.grad, torch.full((5, 3), -0.5 * 3e-4 / 15))


# The update


@pytest.mark.parametrize("seed", [1, 2])
def test_losses_at_initialisation_equal_the_reference(seed):
    torch.manual_seed(seed)
    model = DreamerV3WorldModel((24,), 6, DreamerV3Config(**SIZES["size1m"], batch_length=64, replay_context="zeros"))
    agent = DreamerV3Agent(model)
    batch = batch_of(agent, seed)
    batch["truncated"][:, 20] = True
    before = copy.deepcopy(model.state_dict())
    metrics, columns = agent.update(batch)
    assert columns == {}
    assert metrics["reward_loss"] == pytest.approx(math.log(255), rel=1e-5)
    assert metrics["replay_value_loss"] == pytest.approx(2 * math.log(255) * 62 / 63, rel=1e-4)  # 10.90661
    assert metrics["policy_entropy"] == pytest.approx(6 * 1.30545, rel=2e-3)
    assert metrics["dynamics_loss"] == pytest.approx(metrics["representation_loss"])
    assert metrics["dynamics_loss"] == pytest.approx(6.9, abs=0.5)
    for name, value in model.state_dict().items():  # warm-up: the first update has learning rate 0
        assert torch.equal(value, before[name]), name


def gradients(agent, loss):
    """Names of the parts that a loss reaches."""
    for parameter in [*agent.world_model.parameters(), *agent.behaviour.parameters()]:
        parameter.grad = None
    loss.backward(retain_graph=True)
    reached = set()
    for module in (agent.world_model, agent.behaviour):
        for name, parameter in module.named_parameters():
            if parameter.grad is not None and parameter.grad.any():
                reached.add(name.split(".")[0])
    return reached


def test_each_loss_reaches_its_own_parameters_only():
    agent = shake(tiny_agent())
    batch = batch_of(agent)
    rows = {name: value[:, 1:] for name, value in batch.items()}
    noise = agent._draw_noise(4, 8)
    world = agent.world_model.losses(rows, agent._context(batch), noise.posterior)
    imagined = agent.imagine(world.posterior.states.flatten().detach(), noise)
    returns = imagined.returns(0.95)
    behaviour, _ = agent._behaviour_losses(imagined, returns)
    expected = {
        "reconstruction_loss": {"encoder", "rssm", "decoder"},
        "reward_loss": {"encoder", "rssm", "reward"},
        "continue_loss": {"encoder", "rssm", "continues"},
    }
    for name, parts in expected.items():
        assert gradients(agent, world.parts[name]) == parts, name
    assert gradients(agent, behaviour["policy_loss"]) == {"policy"}
    assert gradients(agent, behaviour["value_loss"]) == {"value"}
    replayed = agent._replay_value_loss(rows, world, imagined, returns[0])
    assert gradients(agent, replayed) == {"encoder", "rssm", "value"}


def test_dynamics_loss_trains_the_prior_and_representation_loss_the_posterior():
    agent = shake(tiny_agent(free_nats=0.0))
    batch = batch_of(agent)
    rows = {name: value[:, 1:] for name, value in batch.items()}
    world = agent.world_model.losses(rows, agent._context(batch), agent._draw_noise(4, 8).posterior)
    rssm = agent.world_model.rssm
    gradients(agent, world.parts["dynamics_loss"])
    assert rssm.prior_logits.weight.grad.any()
    agent.world_model.zero_grad()
    gradients(agent, world.parts["representation_loss"])
    assert rssm.prior_logits.weight.grad is None
    assert rssm.obs_logits.weight.grad.any()


MIXED = {"camera": (3, 64, 64), "state": (3,), "goal": (2,)}


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


def test_stored_latents_are_the_context_of_the_next_window():
    """Filtering rows 1..8 from row 0's stored latents gives what was written back."""
    agent = shake(tiny_agent())
    state = RSSMState(torch.randn(2, 32).to(torch.bfloat16).float(), torch.eye(4)[torch.randint(4, (2, 4))])
    back = compact(state)
    restored = expand(torch.from_numpy(back["deter"]), torch.from_numpy(back["stoch"]), 4)
    assert torch.equal(restored.deter, state.deter)
    assert torch.equal(restored.stoch, state.stoch)
    batch = batch_of(agent)
    context = agent._context(batch)
    assert torch.equal(context.deter, expand(batch["deter"], batch["stoch"], 4).deter[:, 0])


def test_slow_critic_follows_after_the_step():
    agent = shake(tiny_agent())
    slow, online = agent.behaviour.slow_value, agent.behaviour.value
    before = [p.clone() for p in slow.parameters()]
    agent.update(batch_of(agent))
    for old, now, target in zip(before, slow.parameters(), online.parameters(), strict=True):
        assert_close(now, 0.98 * old + 0.02 * target)


# Acting


def test_acting_filters_as_learning_does():
    agent = shake(tiny_agent())
    model = agent.world_model
    obs, first = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32), np.zeros((5, 2), bool)
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
    tokens = model.encoder({"obs": torch.from_numpy(obs)})
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


def test_nan_in_an_update_names_the_loss():
    agent = tiny_agent()
    batch = batch_of(agent)
    batch["obs"][0, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="reconstruction_loss"):
        agent.update(batch)


# The library


def test_the_quick_start_prints_what_it_promises():
    model = create_world_model("dreamerv3:size12m", obs_shape=(3, 64, 64), action_dim=4)
    state = model.encode(torch.randn(1, 3, 64, 64))
    trajectory = model.imagine(state, torch.randn(15, 1, 4))
    assert list(trajectory.rewards.shape) == [15, 1, 1]
    assert len(trajectory.states) == 16
    assert ((trajectory.continues >= 0) & (trajectory.continues <= 1)).all()


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
