"""TD-MPC2 with several tasks, from pixels, and with discrete actions."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.tdmpc2_models import TINY, batch_of, shake
from worldloom import create_world_model
from worldloom import functional as fn
from worldloom.replay.buffer import ReplayBuffer
from worldloom.tdmpc2 import Task, TDMPC2Agent, TDMPC2WorldModel, read_official_episodes
from worldloom.tdmpc2.losses import LossNoise, Transitions, cut_windows, draw_loss_noise, td_target
from worldloom.tdmpc2.pixels import PixelEncoder, draw_shifts, shifted
from worldloom.tdmpc2.planner import Categorical, Planner, PlanNoise
from worldloom.tdmpc2.policy import alternatives, boltzmann, categorical_sample, choose

# Several tasks


EPISODES = Path(__file__).parents[1] / "data" / "tdmpc2_episodes.pt"
TASKS = (Task("walker-walk", 4), Task("cup-catch", 2), Task("mw-reach", 3, 100))


def tasks_model():
    torch.manual_seed(0)
    model = TDMPC2WorldModel((3,), 4, dataclasses.replace(TINY, task_dim=5), tasks=TASKS)
    return shake(model)


@pytest.mark.parametrize(
    ("size", "tasks", "total", "embedding"),
    [
        ("1m", "mt30", 1_426_427, 2_880), ("5m", "mt30", 5_241_066, 1_920), ("19m", "mt30", 16_031_210, 1_920),
        ("48m", "mt30", 48_242_410, 1_920), ("317m", "mt30", 317_316_889, 2_880), ("1m", "mt80", 1_435_067, 7_680),
        ("5m", "mt80", 5_389_930, 7_680), ("19m", "mt80", 18_970_218, 7_680), ("48m", "mt80", 48_791_146, 7_680),
        ("317m", "mt80", 317_383_129, 7_680),
    ],
)  # fmt: skip
def test_multi_task_parameter_counts_equal_the_reference(size, tasks, total, embedding):
    with torch.device("meta"):
        obs = 24 if tasks == "mt30" else 39
        model = create_world_model(f"tdmpc2:{size}", (obs,), 6, device="meta", tasks=tasks)
    assert model.task_embedding.weight.numel() == embedding
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == total


def test_latents_carry_the_embedding_of_their_task_renormalised():
    model = tasks_model()
    with torch.no_grad():
        model.task_embedding.weight[1] = 3.0
        state = model.encode(torch.randn(2, 3), torch.tensor([1, 0]))
        assert_close(state.deterministic[0, 16:], torch.full((5,), 5**-0.5))
        assert_close(model.task_embedding.weight[1].norm().item(), 1.0)
        after = model.predict(state, torch.zeros(2, 4))
        assert torch.equal(after.deterministic[:, 16:], state.deterministic[:, 16:])
        assert torch.equal(after.task, state.task)
    with pytest.raises(ValueError, match="knows 3 tasks, expected their numbers"):
        model.encode(torch.randn(2, 3))


def test_actions_beyond_a_task_are_zero_and_its_own_discount_counts():
    model = tasks_model()
    agent = TDMPC2Agent(model)
    obs, first, task = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32), np.ones(3, bool), np.arange(3)
    for mpc in (True, False):
        model.config = dataclasses.replace(model.config, mpc=mpc)
        actions, state = agent.act(obs, None, first, task=task)
        assert [(row != 0).sum() for row in actions] == [4, 2, 3]
    assert not state["mean"][1, :, 2:].any()
    noise = draw_loss_noise(model, 3, 4)
    next_z = model.latent(torch.randn(3, 3, 3), torch.arange(3)[:, None].expand(3, 3))
    zeros = torch.zeros(3, 3)
    rows = Transitions(torch.zeros(3, 4, 3), torch.zeros(3, 3, 4), zeros, zeros, torch.arange(3))
    target = td_target(model, next_z, rows, noise)
    model.task_embedding.discounts = torch.ones(3)
    assert_close(target / td_target(model, next_z, rows, noise), torch.tensor(
        [[0.99], [0.99], [0.95]]).expand(3, 3))  # fmt: skip


def test_observations_of_smaller_tasks_are_padded_with_zeros():
    model = tasks_model()
    short, task = torch.randn(2, 2), torch.tensor([1, 2])
    padded = torch.cat([short, torch.zeros(2, 1)], 1)
    assert torch.equal(model.encode(short, task).deterministic, model.encode(padded, task).deterministic)
    actions, _ = TDMPC2Agent(model).act(short.numpy(), None, np.ones(2, bool), task=task.numpy())
    assert actions.shape == (2, 4)


def test_planning_for_several_tasks_equals_planning_one_by_one():
    model = tasks_model()
    planner, task = Planner(model), torch.tensor([2, 0])
    z = model.latent(torch.randn(2, 3), task)
    noise, previous = planner.draw_noise(2), torch.randn(2, 3, 4) * model.task_embedding.action_masks[task][:, None]
    actions, plans = planner.plan(z, previous, noise, True, task)
    for e in range(2):
        one = PlanNoise(
            noise.policy[:, e : e + 1], noise.samples[:, :, e : e + 1], noise.terminal[:, e : e + 1], noise.heads,
            noise.choice[e : e + 1], noise.explore[e : e + 1],
        )  # fmt: skip
        action, plan = planner.plan(z[e : e + 1], previous[e : e + 1], one, True, task[e : e + 1])
        assert_close(action[0], actions[e])
        assert_close(plan[0], plans[e])


def test_multi_task_updates_train_the_embedding_but_not_through_the_policy():
    model = tasks_model()
    agent = TDMPC2Agent(model)
    batch = {**batch_of(model), "task": torch.arange(8) % 3}
    first = agent.update(batch)[0]["loss"]
    assert model.task_embedding.weight.grad.any()
    before = model.task_embedding.weight.grad.clone()
    agent.learning.update_policy(
        model.latent(batch["obs"], batch["task"][:, None].expand(8, 4)).detach(), None, torch.tensor(True)
    )
    assert torch.equal(model.task_embedding.weight.grad, before)
    for _ in range(30):
        last = agent.update(batch)[0]["loss"]
    assert last < first
    with pytest.raises(ValueError, match=r"batch\['task'\]: this model knows 3 tasks"):
        agent.update(batch_of(model))


def test_a_new_task_starts_as_a_copy_of_a_known_one():
    model = tasks_model()
    wider = model.with_task(Task("cup-spin", 3), like="cup-catch")
    assert [task.name for task in wider.tasks] == ["walker-walk", "cup-catch", "mw-reach", "cup-spin"]
    obs = torch.randn(4, 3)
    new, old = wider.encode(obs, torch.tensor([3, 3, 1, 0])), model.encode(obs, torch.tensor([1, 1, 1, 0]))
    assert torch.equal(new.deterministic, old.deterministic)
    assert wider.task_embedding.action_masks[3].tolist() == [1, 1, 1, 0]
    with pytest.raises(ValueError, match="'x' like 'y', expected a new name like one of"):
        model.with_task(Task("x", 2), like="y")


def test_several_tasks_learn_offline_from_replay():
    model = tasks_model()
    agent = TDMPC2Agent(model)
    replay = ReplayBuffer(1000, (3,), 4, windows=agent.windows, columns=agent.columns)
    rng = np.random.default_rng(0)
    for episode in range(9):
        actions = rng.uniform(-1, 1, (10, 4)) * model.task_embedding.action_masks[episode % 3].numpy()
        replay.add_episode(
            obs=rng.normal(size=(11, 3)), actions=actions, rewards=actions.sum(1), dones=np.zeros(10), truncated=True,
            task=episode % 3,
        )  # fmt: skip
    losses = []
    for _ in range(60):
        batch = replay.sample(8)
        assert (batch["task"] == batch["task"][:, :1]).all()
        assert (batch["actions"][batch["task"] == 1][:, 2:] == 0).all()
        losses.append(agent.update(batch)[0]["reward_loss"])
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    with pytest.raises(ValueError, match=r"\['tusk'\] are no extra columns, expected \['task'\]"):
        replay.add_episode(obs=rng.normal(size=(3, 3)), actions=np.zeros((2, 4)), rewards=[0, 0], dones=[0, 0], tusk=1)


def test_official_episode_files_learn_offline():
    """The file was written by tensordict 0.8.3: 4 episodes of 6 rows, tasks 0 and 1, NaN in row 0."""
    torch.manual_seed(0)
    model = TDMPC2WorldModel((3,), 2, dataclasses.replace(TINY, task_dim=5), tasks=(Task("a", 2), Task("b", 1)))
    agent = TDMPC2Agent(model)
    replay = ReplayBuffer(1000, (3,), 2, windows=agent.windows, columns=agent.columns)
    for episode in read_official_episodes(EPISODES):
        replay.add_episode(**episode)
    assert (replay.num_episodes, len(replay)) == (4, 24)
    batch = replay.sample(64)
    assert set(batch["task"].ravel().tolist()) == {0, 1}
    assert np.isfinite(agent.update(batch)[0]["loss"])


def test_official_episodes_keep_the_order_of_the_file():
    first = next(read_official_episodes(EPISODES))
    torch.manual_seed(0)  # as the file was made
    obs, action = torch.randn(4, 6, 3), torch.rand(4, 6, 2) * 2 - 1
    reward = torch.randn(4, 6)
    assert_close(torch.from_numpy(first["obs"]), obs[0])
    assert_close(torch.from_numpy(first["actions"]), action[0, 1:])  # what led to rows 1 to 5
    assert_close(torch.from_numpy(first["rewards"]), reward[0, 1:])
    assert (first["task"], first["truncated"], first["dones"].any()) == (0, True, False)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Bomb(), "holds __builtin__.exec, expected a TensorDict"),
        ({"obs": torch.zeros(2, 5, 3)}, "holds obs, expected a TensorDict of action, obs, reward"),
        ({"obs": torch.zeros(2, 4, 3), "action": torch.zeros(2, 5, 2), "reward": torch.zeros(2, 5)}, "of one length T"),
        (3, "holds int, expected"),
    ],
)
def test_other_files_are_no_episodes(made, message, tmp_path):
    torch.save(made, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=message):
        next(read_official_episodes(tmp_path / "file.pt"))


# Pixels


def test_pixel_parameter_counts_equal_the_reference():
    with torch.device("meta"):
        model = create_world_model("tdmpc2:5m", (9, 64, 64), 4, device="meta")
    assert sum(p.numel() for p in model.encoder.parameters()) == 58_272
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4_870_150


def test_pixel_encoder_is_four_convolutions_and_simnorm():
    torch.manual_seed(0)
    encoder = PixelEncoder((9, 64, 64), 512, 8)
    images = torch.randint(256, (2, 9, 64, 64), dtype=torch.uint8)
    x = images / 255 - 0.5
    for conv, stride in zip(encoder.convs, (2, 2, 2, 1), strict=True):
        x = torch.nn.functional.conv2d(x, conv.weight, conv.bias, stride)
        x = x if stride == 1 else x.relu()
    assert x.shape == (2, 32, 4, 4)
    expected = x.flatten(1).view(2, 64, 8).softmax(-1).view(2, 512)
    assert_close(encoder(images), expected)
    assert_close(encoder(images / 255, torch.full((2, 2), 3)), expected)  # a shift of 3 leaves images as they are


def test_shifts_move_each_image_by_its_own_distance_and_repeat_the_border():
    image = torch.arange(64.0).view(1, 8, 8)
    moved = shifted(image.expand(3, 1, 8, 8), torch.tensor([[3, 3], [0, 3], [3, 6]]))
    assert torch.equal(moved[0, 0], image[0])
    assert torch.equal(moved[1, 0, :, 3:], image[0, :, :5])  # content moves right by 3
    assert torch.equal(moved[1, 0, :, :3], image[0, :, :1].expand(8, 3))
    assert torch.equal(moved[2, 0, :5], image[0, 3:])  # and here up by 3
    drawn = draw_shifts((1000,), torch.device("cpu"))
    assert (drawn.min().item(), drawn.max().item()) == (0, 6)


@pytest.mark.parametrize("augment_eval", [True, False])
def test_pixel_agents_act_and_learn(augment_eval):
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, augment_eval=augment_eval)
    agent = TDMPC2Agent(TDMPC2WorldModel((3, 64, 64), 2, config, episode_length=200))
    model = agent.world_model
    assert model.encoder.projection is not None  # 16 latents: a projection of ours
    obs = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(model.encode(obs).deterministic, model.encode(obs).deterministic) != augment_eval
    actions, _ = agent.act(obs.numpy(), None, np.ones(2, bool))
    assert actions.shape == (2, 2)
    batch = batch_of(model)
    batch["obs"] = torch.randint(256, (8, 4, 3, 64, 64), dtype=torch.uint8)
    first = agent.update(batch)[0]["reward_loss"]
    for _ in range(40):
        last = agent.update(batch)[0]["reward_loss"]
    assert last < first


# Discrete actions


def test_choices_follow_their_probabilities():
    torch.manual_seed(0)
    probs = torch.tensor([0.7, 0.3, 0.1, 0.2, 0.7])
    drawn = choose(probs.log(), torch.randn(100_000, 5), (2, 3))
    assert_close(drawn.mean(0), probs, rtol=0, atol=6e-3)
    assert_close((drawn[:, 0] * drawn[:, 4]).mean().item(), 0.49, rtol=0, atol=6e-3)


def test_categorical_samples_have_exact_entropy():
    logits = torch.tensor([1.0, 2, 0, 0, 1])
    sample = categorical_sample(logits, torch.zeros(5), (2, 3))
    assert sample.mean_action.tolist() == [0, 1, 0, 0, 1]
    p, q = logits[:2].softmax(0), logits[2:].softmax(0)
    assert_close(sample.entropy, -(p * p.log()).sum() - (q * q.log()).sum())
    assert_close(sample.log_prob, (sample.action * torch.cat([p.log(), q.log()])).sum())


def test_alternatives_change_one_part_at_a_time():
    found = alternatives(torch.tensor([0.0, 1, 1, 0, 0]), (2, 3))
    assert found.tolist() == [[1, 0, 1, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 1, 0, 0, 1]]


@pytest.mark.parametrize("classes", [(3,), (2, 3)])
def test_the_policy_that_discrete_updates_aim_at_is_the_best_for_value_and_entropy(classes):
    torch.manual_seed(0)
    values, temperature = torch.randn(sum(classes)), torch.tensor(0.7)

    def worth(logits):
        parts = [part.log_softmax(-1) for part in logits.split(classes, -1)]
        chances, logs = torch.cat(parts, -1).exp(), torch.cat(parts, -1)
        return (chances * values).sum(-1) - temperature * (chances * logs).sum(-1)

    best = boltzmann(values, temperature, classes)
    assert_close(torch.stack([part.sum() for part in best.split(classes)]), torch.ones(len(classes)))
    logits = best.log().requires_grad_()
    (gradient,) = torch.autograd.grad(worth(logits), logits)
    assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)
    assert (worth(best.log() + 0.1 * torch.randn(500, len(best))) <= worth(best.log()) + 1e-6).all()


def test_a_policy_that_is_sure_of_the_wrong_choice_finds_back():
    torch.manual_seed(0)
    model = TDMPC2WorldModel((3,), 3, dataclasses.replace(TINY, lr=3e-3), episode_length=200, action_classes=(3,))
    agent = TDMPC2Agent(model, action_classes=(3,))
    with torch.no_grad():
        model.policy[-1].bias.copy_(torch.tensor([40.0, 0, 0]))
        model.q.output.bias[:] = 0
    agent.learning.frozen_value = lambda z, action, heads, keep: action[..., 2]
    z = torch.randn(64, 4, 16)
    before = model.policy(z).softmax(-1)[..., 0].min()
    for _ in range(600):
        agent.learning.update_policy(z, None, torch.tensor(True))
    assert before > 0.99
    assert model.policy(z).softmax(-1)[..., 2].mean() > 0.9


@pytest.mark.parametrize("classes", [(3,), (2, 3)])
def test_the_value_of_a_discrete_policy_is_its_expectation(classes):
    """Against all joint actions, enumerated; with several parts only the mean over draws is exact."""
    torch.manual_seed(0)
    size, draws = sum(classes), 1 if len(classes) == 1 else 40_000
    model = shake(TDMPC2WorldModel((3,), size, TINY, episode_length=200, action_classes=classes))
    z, heads = torch.randn(1, 16), torch.tensor([0, 1])

    def value(actions):
        return model.values(z.expand(*actions.shape[:-1], -1), actions, heads).amin(0)

    joint = torch.stack([torch.cat(choice) for choice in itertools.product(*(torch.eye(n) for n in classes))])
    log_probs = torch.cat([part.log_softmax(-1) for part in model.policy(z)[0].split(classes)])
    expected = ((joint * log_probs).sum(-1).exp() * value(joint)).sum()
    sample = model.policy.sample(z.expand(draws, -1), torch.randn(draws, size))
    spread = value(joint).std().item()
    found = sample.expected(sample.values(value)).mean()
    assert_close(found, expected, rtol=0, atol=1e-6 if draws == 1 else 0.02 * spread)


def test_targets_and_plans_weigh_the_choices_of_a_discrete_policy():
    torch.manual_seed(0)
    model = shake(TDMPC2WorldModel((3,), 3, TINY, episode_length=200, action_classes=(3,)))
    z, heads = torch.randn(2, 4, 16), torch.tensor([0, 1])
    noise = [LossNoise(torch.randn(2, 4, 3), heads, None) for _ in range(2)]
    zero = torch.zeros(2, 4)
    rows = Transitions(torch.zeros(2, 5, 3), torch.zeros(2, 4, 3), zero, zero, None)
    found = [td_target(model, z, rows, draw) for draw in noise]
    assert_close(found[0], found[1])  # whatever was drawn
    chances = model.policy(z).softmax(-1)
    logits = [model.target_q(torch.cat([z, choice.expand(2, 4, 3)], -1), heads) for choice in torch.eye(3)]
    all_values = torch.stack([fn.symlog_mean(one, model.bins).amin(0) for one in logits], -1)
    assert_close(found[0], model.discount * (chances * all_values).sum(-1))
    actions = torch.nn.functional.one_hot(torch.randint(3, (2, 4, 5)), 3).float()  # [H, E, S, A]
    planner, rate = Planner(model), torch.full((4,), model.discount)
    totals = [planner.sequence_value(z[0], actions, torch.randn(4, 5, 3), heads, rate) for _ in range(2)]
    assert_close(totals[0], totals[1])


def test_discrete_plans_average_elites_and_keep_every_choice_possible():
    start = Categorical.around(torch.tensor([0.9, 0.1, 0, 0, 0]).view(1, 1, 5), (2, 3), 0.3)
    assert_close(start.probs.flatten(), torch.tensor([0.7, 0.3, 1 / 3, 1 / 3, 1 / 3]))
    actions = torch.tensor([[1.0, 0, 1, 0, 0], [0.0, 1, 1, 0, 0]]).view(1, 1, 2, 5)
    fitted = start.refit(torch.tensor([[0.25, 0.75]]), actions)
    assert_close(fitted.probs.flatten(), torch.tensor([0.325, 0.675, 0.8, 0.1, 0.1]))
    assert fitted.settle(actions[0, :, 0]).tolist() == [[0, 1, 1, 0, 0]]  # though the other elite was drawn


def test_discrete_planning_finds_the_better_choice():
    torch.manual_seed(0)
    model = TDMPC2WorldModel((3,), 3, TINY, episode_length=200, action_classes=(3,))
    model.predict_reward = lambda z, action: action[..., 1] - action[..., 0]
    agent = TDMPC2Agent(model, action_classes=(3,))
    actions, state = agent.act(np.zeros((20, 3), np.float32), None, np.ones(20, bool), explore=False)
    assert (actions.argmax(1) == 1).all()
    assert (state["mean"][:, :, 1] > 0.7).all()


def test_discrete_updates_move_the_policy_towards_the_better_choice():
    torch.manual_seed(0)
    model = TDMPC2WorldModel((3,), 3, dataclasses.replace(TINY, lr=3e-3), episode_length=200, action_classes=(3,))
    agent = TDMPC2Agent(model, action_classes=(3,))
    batch = batch_of(model, 64)
    batch["actions"] = torch.nn.functional.one_hot(torch.randint(3, (64, 4)), 3).float()
    batch["rewards"] = batch["actions"][..., 2]
    for _ in range(150):
        agent.update(batch)
    assert (model.policy(model.latent(batch["obs"][:, 0])).argmax(-1) == 2).float().mean() > 0.9


def test_long_sequences_are_cut_into_windows_that_share_their_end_rows():
    rows = torch.arange(20).view(2, 10)
    batch = {"obs": rows[..., None].float(), "actions": rows[..., None].float(), "task": torch.tensor([4, 7])}
    cut = cut_windows(batch, 4)
    assert cut["obs"][..., 0].tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [10, 11, 12, 13, 14], [14, 15, 16, 17, 18]]
    assert cut["task"].tolist() == [4, 4, 7, 7]
    assert cut_windows(batch, 9) is batch
