"""TD-MPC2 against golden numbers of the authors' code and against hand-worked values."""

import copy

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.tdmpc2_models import batch_of, shake, tiny_model
from worldloom import create_world_model
from worldloom.catalog import build_config
from worldloom.tdmpc2 import TDMPC2Agent, TDMPC2Config, TDMPC2WorldModel
from worldloom.tdmpc2.agent import RunningScale, policy_loss
from worldloom.tdmpc2.planner import Gaussian, Planner, PlanNoise, elite_weights
from worldloom.tdmpc2.world_model import squashed_sample

COUNTS = [  # size, obs, A, episodic, total, encoder, dynamics, reward, policy, q
    ("1m", 39, 4, False, 1_213_879, 43_904, 249_984, 239_333, 201_992, 478_666),
    ("5m", 39, 4, False, 4_955_238, 143_360, 793_088, 581_221, 531_464, 2_906_105),
    ("19m", 39, 4, False, 18_059_366, 1_883_392, 2_633_984, 1_948_773, 1_849_352, 9_743_865),
    ("48m", 39, 4, False, 47_202_918, 7_887_104, 5_984_000, 4_786_533, 4_612_616, 23_932_665),
    ("317m", 39, 4, False, 312_558_549, 56_180_768, 28_094_496, 22_868_069, 22_470_664, 182_944_552),
    ("5m", 39, 4, True, 5_483_111, 143_360, 793_088, 581_221, 531_464, 2_906_105),
    ("5m", 223, 38, False, 5_159_082, 190_464, 810_496, 598_629, 566_348, 2_993_145),
    ("5m", 67, 21, False, 5_040_776, 150_528, 801_792, 589_925, 548_906, 2_949_625),
]


@pytest.mark.parametrize(
    ("size", "obs", "action", "episodic", "total", "encoder", "dynamics", "reward", "policy", "q"), COUNTS
)
def test_parameter_counts_equal_the_reference(size, obs, action, episodic, total, encoder, dynamics, reward, policy, q):
    with torch.device("meta"):
        model = TDMPC2WorldModel((obs,), action, build_config(f"tdmpc2:{size}", {"episodic": episodic}))

    def count(module):
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    parts = [count(m) for m in (model.encoder, model.dynamics, model.reward, model.policy, model.q)]
    assert parts == [encoder, dynamics, reward, policy, q]
    assert count(model) == total


@pytest.mark.parametrize(
    ("length", "discount"),
    [
        (1, 0.95), (100, 0.95), (101, 0.9504950), (125, 0.96), (150, 0.9666667), (200, 0.975), (250, 0.98),
        (500, 0.99), (501, 0.9900200), (600, 0.9916667), (1000, 0.995), (5000, 0.995),
    ],
)  # fmt: skip
def test_discount_equals_golden_values(length, discount):
    assert TDMPC2Config().discount_for(length) == pytest.approx(discount, abs=1e-7)


@pytest.mark.parametrize(
    ("x", "scales"),
    [
        (torch.arange(256.0), (3.2849998, 5.5471497)),
        (torch.tensor([3.0, -1, 4, 1, 5, 9, 2, 6]), (1.0725,)),
        (torch.full((50,), 7.0), (1.0, 1.0)),
    ],
)
def test_running_scale_equals_golden_values(x, scales):
    scale = RunningScale(0.01)
    for expected in scales:
        scale.update(x)
        assert scale.value.item() == pytest.approx(expected, rel=1e-6)


def test_policy_log_std_equals_golden_values():
    model = tiny_model(action=5)
    raw = torch.tensor([-10.0, -1, 0, 1, 10])
    model.policy = torch.nn.Identity()
    sample = model.sample_policy(torch.cat([torch.zeros(5), raw]), torch.zeros(5))
    expected = torch.tensor([-9.99999998, -8.56956494, -4, 0.56956494, 1.99999998])
    assert_close(sample.log_std, expected, rtol=1e-6, atol=1e-6)


def test_squashed_sample_equals_golden_values():
    mean, log_std, noise = (torch.tensor(v, dtype=torch.float64) for v in ([0.2, -0.3], [-1, 0.5], [0.5, -1]))
    sample = squashed_sample(mean, log_std, noise)
    assert_close(sample.action.tolist(), [0.36612399, -0.96021980], rtol=0, atol=1e-7)
    assert_close(sample.mean_action.tolist(), [0.19737532, -0.29131261], rtol=0, atol=1e-7)
    assert sample.log_prob.item() == pytest.approx(0.7323627, abs=1e-6)
    assert sample.scaled_entropy.item() == pytest.approx(3.9257540, abs=1e-6)  # -A g with g = -1.9628770


def test_mppi_update_equals_golden_values():
    value, actions = torch.tensor([[4.0, 3, 2]]), torch.tensor([0.9, 0.4, 0.1]).view(1, 1, 3, 1)
    weight = elite_weights(value, 0.5)
    assert_close(weight[0], torch.tensor([0.50648039, 0.30719589, 0.18632372]))
    zeros = torch.zeros(1, 1, 1)
    fitted = Gaussian(zeros, zeros, None, 0.05, 2.0).refit(weight, actions)
    assert_close((fitted.mean.item(), fitted.std.item()), (0.5973431, 0.3231794), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("end", "expected"), [(None, 15.62329), (2, 2.98), (3, 5.9203)])
def test_sequence_value_equals_golden_values(end, expected):
    """Rewards 1, 2, 3, a value of 10 and gamma 0.99; the episode ends after step `end`."""
    model = tiny_model(action=1, discount=0.99, episodic=True)
    model.next_latent = lambda z, action: z + 1  # z counts steps
    model.predict_reward = lambda z, action: z[:, 0] + 1
    model.values = lambda z, action, heads: torch.full((2, len(z)), 10.0)
    model.terminates = lambda z: (z[:, 0] == end).float() if end else torch.zeros(len(z))
    model.sample_policy = lambda z, noise, mask: squashed_sample(noise, noise, noise)
    zeros = torch.zeros(3, 1, 1, 1)
    value = Planner(model).sequence_value(
        torch.zeros(1, 1), zeros, torch.zeros(1, 1, 1), torch.arange(2), torch.tensor([0.99])
    )
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_policy_loss_equals_golden_value():
    value = torch.tensor([1.0, 2, 3, 4]).expand(6, 4)
    assert policy_loss(value, torch.zeros(6, 4), 0.5, 1e-4).item() == pytest.approx(-0.8125)


def test_losses_weigh_time_and_heads_as_the_reference():
    model = tiny_model()
    scripted = torch.tensor([1.0, 2.0, 3.0]).expand(8, 3)
    model._cross_entropy = lambda logits, x: scripted if logits.ndim == 3 else scripted.expand(3, 8, 3)
    losses = model.losses(batch_of(model), model.draw_noise(8, 4))
    assert losses.reward_loss.item() == pytest.approx(0.9166667, rel=1e-6)
    assert losses.value_loss.item() == pytest.approx(0.9166667, rel=1e-6)
    total = 20 * losses.consistency_loss + 0.1 * losses.reward_loss + 0.1 * losses.value_loss
    assert_close(losses.loss, total)


def test_consistency_loss_compares_the_rollout_with_encoded_observations():
    model = shake(tiny_model())
    batch = batch_of(model)
    z = model.encoder(batch["obs"][:, 0])
    expected = 0.0
    for t in range(3):  # row t + 1 holds the action that led to obs t + 1
        z = model.next_latent(z, batch["actions"][:, t + 1])
        expected += 0.5**t * (z - model.encoder(batch["obs"][:, t + 1])).square().mean() / 3
    assert_close(model.losses(batch, model.draw_noise(8, 4)).consistency_loss, expected)


def test_td_target_takes_the_smaller_of_two_target_heads_and_stops_at_true_ends():
    model = shake(tiny_model())
    batch = batch_of(model, terminated=True)
    noise = model.draw_noise(8, 4)
    next_z = model.encoder(batch["obs"][:, 1:])
    target = model.td_target(next_z, batch["rewards"][:, 1:], batch["terminated"][:, 1:].float(), noise)
    assert_close(target[:, -1], batch["rewards"][:, -1])
    action = model.sample_policy(next_z, noise.target_action).action
    logits = model.target_q(torch.cat([next_z, action], -1))[noise.target_heads]
    decoded = torch.sign(u := logits.softmax(-1) @ model.bins) * (u.abs().exp() - 1)
    expected = batch["rewards"][:, 1:3] + 0.975 * decoded.min(0).values[:, :2]
    assert_close(target[:, :2], expected, rtol=1e-4, atol=1e-4)


def test_initial_reward_and_value_are_zero():
    model = tiny_model()
    z, action = torch.rand(5, 16), torch.rand(5, 2)
    assert_close(model.predict_reward(z, action), torch.zeros(5), rtol=0, atol=1e-6)
    assert_close(model.values(z, action), torch.zeros(3, 5), rtol=0, atol=1e-6)


def test_update_moves_each_part_with_its_own_loss_only():
    model = shake(tiny_model(episodic=True, tau=0.5))
    agent = TDMPC2Agent(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    metrics, columns = agent.update(batch_of(model, terminated=True))
    changed = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"encoder", "dynamics", "reward", "policy", "q", "termination", "target_q"}
    assert columns == {}
    for name, p in model.target_q.named_parameters():
        expected = (before[f"target_q.{name}"] + model.q.get_parameter(name)) / 2
        assert_close(p, expected)
    assert metrics["termination_loss"] > 0


def test_world_model_losses_leave_the_policy_and_targets_alone():
    model = shake(tiny_model())
    model.losses(batch_of(model), model.draw_noise(8, 4)).loss.backward()
    for name, parameter in model.named_parameters():
        untouched = parameter.grad is None or not parameter.grad.any()
        assert untouched == name.startswith(("policy", "target_q")), name


def test_updates_reduce_the_loss_on_a_fixed_batch():
    model = tiny_model(lr=1e-3)
    agent = TDMPC2Agent(model)
    batch = batch_of(model, batch_size=32)
    losses = [agent.update(batch)[0] for _ in range(150)]
    assert losses[-1]["reward_loss"] < 0.65 * losses[0]["reward_loss"]
    assert losses[-1]["consistency_loss"] < losses[0]["consistency_loss"]


def test_nan_in_an_update_is_refused_by_name():
    agent = TDMPC2Agent(tiny_model())
    batch = batch_of(agent.world_model)
    batch["rewards"][0, 1] = float("nan")
    with pytest.raises(FloatingPointError, match="reward_loss"):
        agent.update(batch)


def single(noise, e):
    return PlanNoise(
        policy=noise.policy[:, e : e + 1],
        samples=noise.samples[:, :, e : e + 1],
        terminal=noise.terminal[:, e : e + 1],
        heads=noise.heads,
        choice=noise.choice[e : e + 1],
        explore=noise.explore[e : e + 1],
    )


@pytest.mark.parametrize("explore", [True, False])
@pytest.mark.parametrize("episodic", [True, False])
def test_planning_for_several_environments_equals_planning_one_by_one(explore, episodic):
    model = shake(tiny_model(episodic=episodic))
    planner = Planner(model)
    noise = planner.draw_noise(4)
    z, previous = model.encoder(torch.randn(4, 3)), torch.rand(4, 3, 2) - 0.5
    with torch.no_grad():
        actions, means = planner.plan(z, previous, noise, explore)
        for e in range(4):
            action, mean = planner.plan(z[e : e + 1], previous[e : e + 1], single(noise, e), explore)
            assert_close(action[0], actions[e], rtol=1e-4, atol=1e-4)
            assert_close(mean[0], means[e], rtol=1e-4, atol=1e-4)
    assert actions.abs().max() <= 1


def test_planning_finds_the_better_action():
    """The reward is the first action dimension: plans must go to its end."""
    model = tiny_model()
    model.predict_reward = lambda z, action: action[:, 0]
    model.values = lambda z, action, heads: torch.zeros(2, len(z))
    planner = Planner(model)
    with torch.no_grad():
        actions, _ = planner.plan(torch.rand(4, 16), torch.zeros(4, 3, 2), planner.draw_noise(4), explore=False)
    assert (actions[:, 0] > 0.6).all()


def test_warm_start_shifts_the_previous_plan_and_is_reset_by_is_first():
    agent = TDMPC2Agent(shake(tiny_model()))
    seen = []
    plan = agent.planner.plan

    def spy(z, previous, *rest):
        seen.append(previous.clone())
        return plan(z, previous, *rest)

    agent.planner.plan = spy
    obs = np.zeros((2, 3), np.float32)
    _, state = agent.act(obs, None, np.array([True, True]))
    agent.act(obs, state, np.array([False, True]))
    assert_close(seen[1][0], state["mean"][0])
    assert not seen[1][1].any()


def test_more_iterations_for_twenty_actions():
    assert Planner(tiny_model(action=19)).iterations == 3
    assert Planner(tiny_model(action=20)).iterations == 5


def test_acting_weights_carry_the_policy_to_another_agent():
    learner = TDMPC2Agent(shake(tiny_model()), seed=3)
    actor = TDMPC2Agent(tiny_model(), seed=3)
    actor.load_acting_weights(learner.acting_weights())
    obs = np.ones((2, 3), np.float32)
    first = np.array([True, True])
    np.testing.assert_array_equal(learner.act(obs, None, first)[0], actor.act(obs, None, first)[0])
    with pytest.raises(ValueError, match="another model's weights"):
        actor.load_acting_weights(np.zeros(5, np.float32))


def test_state_dict_resumes_bit_exactly():
    def run(agent, updates):
        return [agent.update(batch_of(agent.world_model))[0] for _ in range(updates)]

    straight = TDMPC2Agent(tiny_model(), seed=1)
    run(straight, 3)
    state = copy.deepcopy(straight.state_dict())
    expected = run(straight, 3)
    resumed = TDMPC2Agent(shake(tiny_model()), seed=9)
    resumed.load_state_dict(state)
    assert run(resumed, 3) == expected


# The library's first sentence


def test_world_model_protocol_shapes():
    model = create_world_model("tdmpc2:5m", obs_shape=(39,), action_dim=4)
    obs, action = torch.randn(2, 39), torch.rand(2, 4)
    state = model.encode(obs)
    assert state.features.shape == (2, 512)
    assert state.stochastic is None
    assert model.predict(state, action).deterministic.shape == (2, 512)
    assert_close(model.observe(state, action, obs).deterministic, state.deterministic)
    decoded = model.decode(state)
    assert decoded["obs"] is None
    assert {k: tuple(decoded[k].shape) for k in ("reward", "continue", "q_values", "action")} == {
        "reward": (2, 1), "continue": (2, 1), "q_values": (2, 5), "action": (2, 4)
    }  # fmt: skip
    trajectory = model.imagine(state, torch.rand(15, 2, 4))
    assert trajectory.rewards.shape == trajectory.continues.shape == (15, 2, 1)
    assert len(trajectory.states) == 16
    losses = model.compute_loss(batch_of(model))
    assert set(losses) == {"loss", "consistency_loss", "reward_loss", "value_loss", "termination_loss"}
    assert all(value.ndim == 0 for value in losses.values())
    initial = model.initial_state(3)
    assert_close(initial.deterministic.view(3, 64, 8).sum(-1), torch.ones(3, 64))


def test_imagined_continues_are_chances_of_the_termination_head():
    model = shake(tiny_model(episodic=True))
    state = model.encode(torch.randn(4, 3))
    trajectory = model.imagine(state, torch.rand(5, 4, 2))
    expected = 1 - torch.sigmoid(model.termination(trajectory.states[1].deterministic))
    assert_close(trajectory.continues[0], expected)
    assert ((trajectory.continues > 0) & (trajectory.continues < 1)).all()


def test_save_pretrained_round_trip_is_bit_exact(tmp_path):
    model = shake(tiny_model(episodic=True))
    model.save_pretrained(tmp_path)
    loaded = create_world_model(tmp_path)
    assert loaded.discount == model.discount
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"obs_shape=\(3,\).*obs_shape=\(4,\)"):
        create_world_model(tmp_path, obs_shape=(4,))


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        ("tdmpc3:5m", {}, ValueError, "Did you mean tdmpc2:5m"),
        ("tdmpc2:6m", {}, ValueError, "Known: .*tdmpc2:1m"),
        ("tdmpc2:5m", {"obs_shape": (3, 4)}, ValueError, r"obs_shape is \(3, 4\), expected \(V,\) or \(C, H, W\)"),
        ("tdmpc2:5m", {"obs_shape": (3, 38, 64)}, ValueError, "at least 39x39"),
        ("tdmpc2:5m", {"action_dim": 0}, ValueError, "action_dim is 0"),
        ("tdmpc2:5m", {"horzon": 4}, ValueError, "Did you mean 'horizon'"),
        ("tdmpc2:5m", {"horizon": "4"}, TypeError, "agent.horizon is '4'"),
        ("tdmpc2:5m", {"latent_dim": 100}, ValueError, "a multiple of simnorm_dim=8"),
    ],
)
def test_bad_models_are_refused_by_name(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        create_world_model(name, **{"obs_shape": (3,), "action_dim": 1, **kwargs})


def test_wrong_shapes_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"obs is \(2, 4\), expected \[B, 3\]"):
        model.encode(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"actions are \(2, 3\), expected \(2, 2\)"):
        model.predict(model.encode(torch.zeros(2, 3)), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="at least 2: one transition"):
        model.compute_loss(batch_of(model, length=1))
