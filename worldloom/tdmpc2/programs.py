"""TD-MPC2's two ways to act as programs, for `worldloom.export`: the policy prior, and planning."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from worldloom.capture import Tensors
from worldloom.program import Program, example_obs, without
from worldloom.tdmpc2.networks import two_heads
from worldloom.tdmpc2.pixels import as_shifts
from worldloom.tdmpc2.planner import Planner, PlanNoise, gumbel
from worldloom.tdmpc2.world_model import TDMPC2WorldModel

LEARNING_ONLY = ("target_q",)
PLANNING_ONLY = ("dynamics", "reward", "q", "termination")


class PolicyModule(nn.Module):
    """The policy prior: obs, and task numbers of a multi-task model, to actions [E, A]. sample: with noise."""

    def __init__(self, model: TDMPC2WorldModel, sample: bool) -> None:
        super().__init__()
        self.model, self.sample = without(model, *LEARNING_ONLY, *PLANNING_ONLY), sample

    def forward(self, **given: Tensor) -> Tensors:
        z, task = see(self.model, given)
        return {"action": self.model.policy_action(z, given["normal_action"] if self.sample else None, task)}


class PlannerModule(nn.Module):
    """MPPI: obs, is_first, the plan of the step before and noise to actions [E, A] and the next plan [E, H, A]."""

    def __init__(self, model: TDMPC2WorldModel, sample: bool) -> None:
        super().__init__()
        self.model, self.sample = without(model, *LEARNING_ONLY), sample
        self.planner = Planner(self.model)

    def forward(self, **given: Tensor) -> Tensors:
        z, task = see(self.model, given)
        noise = PlanNoise(
            policy=given["normal_policy"],
            samples=given["normal_samples"],
            terminal=given["normal_terminal"],
            heads=two_heads(given["uniform_heads"]),
            choice=gumbel(given["uniform_choice"]),
            explore=given["normal_explore"] if self.sample else torch.zeros(len(z), self.model.action_dim),
        )
        previous = given["plan_in"] * ~given["is_first"][:, None, None]
        action, plan = self.planner.plan(z, previous, noise, self.sample, task)
        return {"action": action, "plan_out": plan}


def see(model: TDMPC2WorldModel, given: Tensors) -> tuple[Tensor, Tensor | None]:
    """Return latents [E, D + T] of the inputs `obs`, `task` and `uniform_shift`, where the program has them, and task
    numbers [E] of a multi-task model."""
    uniform, task = given.get("uniform_shift"), model.task_numbers(given.get("task"), len(given["obs"]))
    return model.latent(given["obs"], task, None if uniform is None else as_shifts(uniform)), task


def policy_program(model: TDMPC2WorldModel, envs: int, sample: bool) -> Program:
    """Return the policy prior of `envs` environments: obs to its mean action, with `sample` to a drawn one."""
    inputs = _seen(model, envs, sample)
    if sample:
        inputs["normal_action"] = torch.zeros(envs, model.action_dim)
    return Program(PolicyModule(model, sample), inputs)


def planner_program(model: TDMPC2WorldModel, envs: int, sample: bool) -> Program:
    """Return planning for `envs` environments; `sample` adds exploration noise, as in training."""
    c, size = model.config, model.action_dim
    module = PlannerModule(model, sample)
    iterations, sampled = module.planner.iterations, c.num_samples - c.num_pi_trajs
    inputs = {
        **_seen(model, envs, sample),
        "is_first": torch.ones(envs, dtype=torch.bool),
        "plan_in": torch.zeros(envs, c.horizon, size),
        "normal_policy": torch.zeros(c.horizon, envs, c.num_pi_trajs, size),
        "normal_samples": torch.zeros(iterations, c.horizon, envs, sampled, size),
        "normal_terminal": torch.zeros(iterations, envs, c.num_samples, size),
        "uniform_heads": torch.rand(iterations, c.num_q),
        "uniform_choice": torch.full((envs, c.num_elites), 0.5),
    }
    if sample:
        inputs["normal_explore"] = torch.zeros(envs, size)
    return Program(module, inputs)


def _seen(model: TDMPC2WorldModel, envs: int, sample: bool) -> dict[str, Tensor]:
    """Return examples of what every program reads: observations, task numbers, shifts of images."""
    inputs, _ = example_obs(model.obs_shape, envs)
    if len(model.tasks) > 1:
        inputs["task"] = torch.zeros(envs, dtype=torch.int64)
    if sample and model.pixels and model.config.augment_eval:
        inputs["uniform_shift"] = torch.full((envs, 2), 0.5)
    return inputs
