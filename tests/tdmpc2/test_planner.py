"""TD-MPC2's search: MPPI against golden numbers and hand-worked values."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.tdmpc2_models import shake, tiny_model
from worldloom.tdmpc2 import TDMPC2Agent
from worldloom.tdmpc2.planner import Planner, PlanNoise, elite_weights
from worldloom.tdmpc2.policy import squashed_sample


def test_mppi_iteration_equals_golden_values():
    """Four one-step sequences, of which the best three are elites."""
    assert_close(elite_weights(torch.tensor([[4.0, 3, 2]]), 0.5)[0], torch.tensor([0.50648039, 0.30719589, 0.18632372]))
    model = tiny_model(action=1, horizon=1, iterations=1, num_samples=4, num_elites=3, num_pi_trajs=0)
    planner = Planner(model)
    planner.sequence_value = lambda *_: torch.tensor([[1.0, 2, 4, 3]])
    sampled = torch.tensor([-0.5, 0.1, 0.9, 0.4]).view(1, 1, 1, 4, 1)
    noise = dataclasses.replace(planner.draw_noise(1), samples=sampled / 2, explore=torch.tensor([[-1.0]]))  # std is 2
    zeros = torch.zeros(1, 1, 1)
    for rank, action in enumerate((0.9, 0.4, 0.1)):
        chosen = dataclasses.replace(noise, choice=100.0 * torch.eye(3)[[rank]])
        acted, plan = planner.plan(torch.rand(1, 16), zeros, chosen, explore=False)
        explored, _ = planner.plan(torch.rand(1, 16), zeros, chosen, explore=True)
        assert_close((acted.item(), plan.item()), (action, 0.5973431), rtol=1e-6, atol=1e-6)
        assert explored.item() == pytest.approx(action - 0.3231794, abs=1e-6)


@pytest.mark.parametrize(("end", "expected"), [(None, 15.62329), (2, 2.98), (3, 5.9203)])
def test_sequence_value_equals_golden_values(end, expected):
    """Rewards 1, 2, 3, a value of 10 and gamma 0.99; the episode ends after step `end`."""
    model = tiny_model(action=1, discount=0.99, episodic=True)
    model.next_latent = lambda z, action: z + 1  # z counts steps
    model.predict_reward = lambda z, action: z[..., 0] + 1
    model.values = lambda z, action, heads: torch.full((2, *z.shape[:-1]), 10.0)
    model.terminates = lambda z: (z[..., 0] == end).float() if end else torch.zeros(z.shape[:-1])
    model.policy.sample = lambda z, noise, mask: squashed_sample(noise, noise, noise)
    zeros = torch.zeros(3, 1, 1, 1)
    value = Planner(model).sequence_value(
        torch.zeros(1, 1), zeros, torch.zeros(1, 1, 1), torch.arange(2), torch.tensor([0.99])
    )
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_the_value_at_the_horizon_is_that_of_a_sampled_action_of_the_policy():
    model = shake(tiny_model())
    model.predict_reward = lambda z, action: torch.zeros(action.shape[:-1])
    model.values = lambda z, action, heads: action[..., 0].expand(2, -1, -1)
    z, actions, terminal = torch.rand(1, 16), torch.rand(3, 1, 5, 2) * 2 - 1, torch.randn(1, 5, 2)
    with torch.no_grad():
        value = Planner(model).sequence_value(z, actions, terminal, torch.arange(2), torch.tensor([0.9]))
        latent = z.expand(5, -1)
        for action in actions[:, 0]:
            latent = model.next_latent(latent, action)
        mean, raw = model.policy(latent).chunk(2, -1)
    drawn = torch.tanh(mean + terminal[0] * torch.exp(-10 + 6 * (torch.tanh(raw) + 1)))
    assert_close(value[0], 0.9**3 * drawn[:, 0])
    assert (drawn - torch.tanh(mean)).abs().max() > 1e-3


def test_plans_start_from_the_previous_one_moved_on_by_a_step():
    """Without spread, all sequences are that first mean."""
    model = shake(tiny_model(num_pi_trajs=0))
    planner = Planner(model)
    noise = planner.draw_noise(2)
    noise = dataclasses.replace(noise, samples=torch.zeros_like(noise.samples))
    previous = torch.rand(2, 3, 2) - 0.5
    with torch.no_grad():
        actions, plan = planner.plan(torch.rand(2, 16), previous, noise, explore=False)
    assert_close(actions, previous[:, 1])
    assert_close(plan, torch.cat([previous[:, 1:], torch.zeros(2, 1, 2)], 1))


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
    model.predict_reward = lambda z, action: action[..., 0]
    model.values = lambda z, action, heads: torch.zeros(2, *z.shape[:-1])
    planner = Planner(model)
    with torch.no_grad():
        actions, _ = planner.plan(torch.rand(4, 16), torch.zeros(4, 3, 2), planner.draw_noise(4), explore=False)
    assert (actions[:, 0] > 0.6).all()


def test_every_environment_starts_from_its_own_plan_unless_is_first_resets_it():
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
