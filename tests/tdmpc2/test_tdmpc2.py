"""TD-MPC2 against golden numbers of the authors' code and against hand-worked values."""

import copy
import inspect

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.tdmpc2_models import batch_of, shake, tiny_model
from worldloom import create_world_model
from worldloom.families import build_config
from worldloom.tdmpc2 import TDMPC2Agent, TDMPC2Config, TDMPC2WorldModel
from worldloom.tdmpc2.losses import RunningScale, discounted_mean, draw_loss_noise, joint_loss, td_target, transitions
from worldloom.tdmpc2.policy import HALF_LOG_TAU, GaussianSample, bounded, squashed_sample

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
        scale.value = scale.after(x)
        assert scale.value.item() == pytest.approx(expected, rel=1e-6)


def test_policy_log_std_equals_golden_values():
    raw = torch.tensor([-10.0, -1, 0, 1, 10])
    expected = torch.tensor([-9.99999998, -8.56956494, -4, 0.56956494, 1.99999998])
    assert_close(bounded(raw, -10.0, 2.0), expected, rtol=1e-6, atol=1e-6)
    policy = tiny_model(action=5).policy
    policy.forward = lambda z: torch.cat([torch.zeros(5), raw])
    assert_close(policy.sample(torch.zeros(16), torch.zeros(5)).log_std, expected, rtol=1e-6, atol=1e-6)


def test_squashed_sample_equals_golden_values():
    mean, log_std, noise = (torch.tensor(v, dtype=torch.float64) for v in ([0.2, -0.3], [-1, 0.5], [0.5, -1]))
    sample = squashed_sample(mean, log_std, noise)
    assert_close(sample.action.tolist(), [0.36612399, -0.96021980], rtol=0, atol=1e-7)
    assert_close(sample.mean_action.tolist(), [0.19737532, -0.29131261], rtol=0, atol=1e-7)
    assert sample.log_prob.item() == pytest.approx(0.7323627, abs=1e-6)
    assert sample.scaled_entropy.item() == pytest.approx(3.9257540, abs=1e-6)  # -A g with g = -1.9628770


def test_policy_loss_equals_golden_value():
    value, action = torch.tensor([1.0, 2, 3, 4]).expand(6, 4), torch.zeros(6, 4, 1)
    log_std = torch.full_like(action, -HALF_LOG_TAU)  # then the entropy that is added is 0
    sample = GaussianSample(action, action, log_std, action)
    loss = discounted_mean(sample.loss(value, torch.tensor(1.0), 1e-4), 0.5)
    assert loss.item() == pytest.approx(-0.8125)


def test_losses_weigh_time_and_heads_as_the_reference(monkeypatch):
    model = tiny_model()
    scripted = torch.tensor([1.0, 2.0, 3.0]).expand(8, 3)
    given = lambda logits, x, bins: scripted if logits.ndim == 3 else scripted.expand(3, 8, 3)  # noqa: E731
    monkeypatch.setattr("worldloom.tdmpc2.losses.cross_entropy", given)
    losses = joint_loss(model, batch_of(model), draw_loss_noise(model, 8, 4))
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
    assert_close(joint_loss(model, batch, draw_loss_noise(model, 8, 4)).consistency_loss, expected)


def test_td_target_takes_the_smaller_of_two_target_heads_and_stops_at_true_ends():
    model = shake(tiny_model())
    batch = batch_of(model, terminated=True)
    noise = draw_loss_noise(model, 8, 4)
    next_z = model.encoder(batch["obs"][:, 1:])
    target = td_target(model, next_z, transitions(model, batch), noise)
    assert_close(target[:, -1], batch["rewards"][:, -1])
    action = model.policy.sample(next_z, noise.target_action).action
    logits = model.target_q(torch.cat([next_z, action], -1))[noise.target_heads]
    decoded = torch.sign(u := logits.softmax(-1) @ model.bins) * (u.abs().exp() - 1)
    expected = batch["rewards"][:, 1:3] + 0.975 * decoded.min(0).values[:, :2]
    assert_close(target[:, :2], expected, rtol=1e-4, atol=1e-4)


def test_hidden_weights_start_as_untruncated_normals_of_std_002_values_included():
    torch.manual_seed(0)
    model = create_world_model("tdmpc2:5m", (39,), 4)
    zeroed, normal = ("reward.2.weight", "q.output.weight", "target_q.output.weight"), []
    for name, parameter in model.named_parameters():
        if name.endswith("ln.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias") or name in zeroed:
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.04), name
            normal.append(parameter.flatten())
    outside = torch.cat(normal).abs() > 0.04
    assert outside.float().mean().item() == pytest.approx(0.0455, abs=1e-3)  # of a normal, beyond two sigma


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
    joint_loss(model, batch_of(model), draw_loss_noise(model, 8, 4)).loss.backward()
    for name, parameter in model.named_parameters():
        untouched = parameter.grad is None or not parameter.grad.any()
        assert untouched == name.startswith(("policy", "target_q")), name


def calls_of(ensemble):
    """The arguments, by name, of every evaluation from here on."""
    forward, seen = ensemble.forward, []

    def spy(*args, **kwargs):
        seen.append(inspect.signature(forward).bind(*args, **kwargs).arguments)
        return forward(*args, **kwargs)

    ensemble.forward = spy
    return seen


def test_dropout_is_for_online_and_frozen_values_in_learning_and_never_for_targets():
    model = shake(tiny_model(dropout=0.2))
    agent = TDMPC2Agent(model)
    online, target = calls_of(model.q), calls_of(model.target_q)
    agent.update(batch_of(model))
    assert [call.get("dropped") for call in target] == [None]
    assert [call.get("frozen", False) for call in online] == [False, True]  # the value loss, then the policy's
    assert [tuple(call["dropped"].shape) for call in online] == [(8, 3, 3, 24), (8, 4, 2, 24)]  # every head its own
    for call in online:
        dropped = call["dropped"]
        assert call["rate"] == 0.2
        assert dropped.float().mean().item() == pytest.approx(0.2, abs=0.04)
        assert not torch.equal(dropped[..., 0, :], dropped[..., 1, :])
    online.clear()
    agent.act(np.zeros((2, 3), np.float32), None, np.array([True, True]))
    assert [call.get("dropped") for call in online] == [None] * model.config.iterations


def test_each_part_follows_an_adam_of_its_own():
    model = shake(tiny_model(episodic=True))
    agent = TDMPC2Agent(model)
    settings = {"encoder": (9e-5, 1e-8), "policy": (3e-4, 1e-5)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in trained.items()}
    for step in (1, 2, 3):
        before = {name: p.detach().clone() for name, p in trained.items()}
        agent.update(batch_of(model, terminated=True))
        if step == 1:  # or eps would not show
            assert any((p.grad.abs() < 1e-4).any() for p in model.policy.parameters())
        for name, p in trained.items():
            lr, eps = settings.get(name.split(".")[0], (3e-4, 1e-8))
            mean, square = moments[name]
            mean.mul_(0.9).add_(0.1 * p.grad)
            square.mul_(0.999).add_(0.001 * p.grad.square())
            expected = lr * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + eps)
            assert_close(before[name] - p.detach(), expected, rtol=1e-3, atol=3e-7)


def test_gradients_are_clipped_to_a_norm_of_twenty_the_policys_apart():
    model = shake(tiny_model(consistency_coef=600.0, entropy_coef=1e6))
    agent = TDMPC2Agent(model)
    for _ in range(2):  # by the second, the policy has a gradient of its own left
        metrics, _ = agent.update(batch_of(model))
    policy = list(model.policy.parameters())
    rest = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("policy")]
    for found, parameters in (("grad_norm", rest), ("policy_grad_norm", policy)):
        assert metrics[found] > 25
        norm = torch.cat([p.grad.flatten() for p in parameters]).norm().item()
        assert norm == pytest.approx(20, rel=1e-4)


def test_metrics_show_the_size_of_updates():
    agent = TDMPC2Agent(shake(tiny_model()))
    trained = agent.learning.model_optimizer.params
    assert agent.learning.model_optimizer.update_norm() == 0
    for _ in range(3):
        before = torch.cat([p.detach().flatten().clone() for p in trained])
        metrics, _ = agent.update(batch_of(agent.world_model))
        moved = (torch.cat([p.detach().flatten() for p in trained]) - before).norm().item()
        assert float(metrics["update_norm"]) == pytest.approx(moved, rel=1e-3)


def test_the_policy_learns_on_every_rolled_out_state_with_values_after_their_step():
    model = shake(tiny_model())
    agent, batch = TDMPC2Agent(model), batch_of(model)
    with torch.no_grad():
        latents = [model.encoder(batch["obs"][:, 0])]
        for t in range(3):
            latents.append(model.next_latent(latents[-1], batch["actions"][:, t + 1]))
    before, update, seen = model.q.first.weight.clone(), agent.learning.update_policy, []

    def spy(z, mask, allowed):
        seen.append((z, model.q.first.weight.clone()))
        return update(z, mask, allowed)

    agent.learning.update_policy = spy
    agent.update(batch)
    ((z, weight),) = seen
    assert_close(z, torch.stack(latents, 1))  # H + 1 states
    assert not z.requires_grad
    assert not torch.equal(weight, before)
    assert torch.equal(weight, model.q.first.weight)


def test_the_value_scale_follows_the_first_state_and_divides_values_but_not_entropies():
    agent = TDMPC2Agent(tiny_model(entropy_coef=1.0))
    first, later = torch.linspace(0, 70, 8), torch.linspace(0, 1000, 24).view(8, 3)
    value = torch.cat([first[:, None], later], 1)
    agent.learning.frozen_value = lambda *_: value
    z, noise = torch.rand(8, 4, 16), torch.randn(8, 4, 2)
    loss, _, _, moved = agent.learning.policy_loss(z, noise, torch.arange(2), None, None)
    scale = 1.62  # 1 + 0.01 (66.5 - 3.5 - 1), the percentiles of `first`
    assert moved.item() == pytest.approx(scale, rel=1e-6)
    entropy = agent.world_model.policy.sample(z, noise).scaled_entropy
    expected = -((value / scale + entropy).mean(0) * torch.tensor([1, 0.5, 0.25, 0.125])).mean()
    assert_close(loss, expected)


def test_updates_reduce_the_loss_on_a_fixed_batch():
    model = tiny_model(lr=1e-3)
    agent = TDMPC2Agent(model)
    batch = batch_of(model, batch_size=32)
    losses = [agent.update(batch)[0] for _ in range(150)]
    assert losses[-1]["reward_loss"] < 0.65 * losses[0]["reward_loss"]
    assert losses[-1]["consistency_loss"] < losses[0]["consistency_loss"]


def everything(agent):
    """Every number that an update may change; what only counts calls or draws is left out."""
    state = {name: value for name, value in agent.state_dict().items() if name not in ("updates", "generator")}
    leaves, _ = torch.utils._pytree.tree_flatten(state)
    return [torch.as_tensor(leaf).clone() for leaf in leaves if isinstance(leaf, (torch.Tensor, float, int))]


@pytest.mark.parametrize("where", ["model", "policy"])
def test_an_update_with_nan_changes_nothing_and_several_in_a_row_name_the_loss(where):
    agent = TDMPC2Agent(shake(tiny_model()))
    good, bad = batch_of(agent.world_model), batch_of(agent.world_model)
    agent.update(good)
    before, whole = everything(agent), agent.learning.policy_loss
    if where == "model":
        bad["rewards"][0, 1] = float("nan")
    else:
        agent.learning.policy_loss = lambda *given: (whole(*given)[0] * float("nan"), *whole(*given)[1:])
    metrics, _ = agent.update(bad)
    assert metrics["skipped_updates"] == 1
    changed = [a for a, b in zip(everything(agent), before, strict=True) if not torch.equal(a, b)]
    if where == "model":
        assert not changed
    for _ in range(4):
        agent.learn(bad)
    with pytest.raises(
        FloatingPointError, match=f"updates in a row.*{'reward' if where == 'model' else 'policy'}_loss"
    ):
        agent.collect()


def test_acting_weights_carry_the_policy_to_another_agent():
    learner = TDMPC2Agent(shake(tiny_model()), seed=3)
    actor = TDMPC2Agent(tiny_model(), seed=3)
    actor.load_acting_weights(learner.acting_weights())
    obs = np.ones((2, 3), np.float32)
    first = np.array([True, True])
    np.testing.assert_array_equal(learner.act(obs, None, first)[0], actor.act(obs, None, first)[0])
    with pytest.raises(ValueError, match="expected .* They belong to another model"):
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
