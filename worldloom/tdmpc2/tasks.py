"""The tasks of TD-MPC2's multi-task models; their order fixes the rows of the task embedding.

Hansen et al. 2024, appendix C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloom import functional as fn
from worldloom.tdmpc2.config import TDMPC2Config

DM_CONTROL_STEPS, META_WORLD_STEPS = 500, 100  # agent steps per episode

_DM_CONTROL = """
walker-stand walker-walk walker-run cheetah-run reacher-easy reacher-hard acrobot-swingup pendulum-swingup
cartpole-balance cartpole-balance-sparse cartpole-swingup cartpole-swingup-sparse cup-catch finger-spin finger-turn-easy
finger-turn-hard fish-swim hopper-stand hopper-hop walker-walk-backwards walker-run-backwards cheetah-run-backwards
cheetah-run-front cheetah-run-back cheetah-jump hopper-hop-backwards reacher-three-easy reacher-three-hard cup-spin
pendulum-spin
"""

_META_WORLD = """
assembly basketball button-press-topdown button-press-topdown-wall button-press button-press-wall coffee-button
coffee-pull coffee-push dial-turn disassemble door-open door-close drawer-close drawer-open faucet-open faucet-close
hammer handle-press-side handle-press handle-pull-side handle-pull lever-pull peg-insert-side peg-unplug-side
pick-out-of-hole pick-place pick-place-wall plate-slide plate-slide-side plate-slide-back plate-slide-back-side
push-back push push-wall reach reach-wall shelf-place soccer stick-push stick-pull sweep-into sweep window-open
window-close bin-picking box-close door-lock door-unlock hand-insert
"""

_ACTIONS = {  # by family, the longest matching name first
    "reacher-three": 3, "walker": 6, "cheetah": 6, "fish": 5, "hopper": 4, "reacher": 2, "cup": 2, "finger": 2,
    "acrobot": 1, "pendulum": 1, "cartpole": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One of the tasks of a multi-task model.

    action_dim: the number of the model's action dimensions that it uses, the first ones. episode_length: agent steps,
    which set its discount, unless it is given; None without a limit.
    """

    name: str
    action_dim: int
    episode_length: int | None = DM_CONTROL_STEPS
    discount: float | None = None  # gamma


class TaskEmbedding(nn.Embedding):
    """A vector for each task, an input of every network: T numbers, learned, of L2 norm at most 1 (section 3.1); or
    given, of any norm, and not learned (Hansen et al. 2025)."""

    action_masks: Tensor  # [tasks, A], 1 for the action dimensions that a task uses
    discounts: Tensor  # [tasks]

    def __init__(self, tasks: Sequence[Task], action_dim: int, config: TDMPC2Config) -> None:
        super().__init__(len(tasks), config.task_dim)
        self.tasks, self.given = tuple(tasks), config.given_tasks
        self.weight.requires_grad_(not self.given)
        masks = torch.tensor([[float(i < task.action_dim) for i in range(action_dim)] for task in tasks])
        discounts = torch.tensor([task.discount or config.discount_for(task.episode_length) for task in tasks])
        self.register_buffer("action_masks", masks, persistent=False)
        self.register_buffer("discounts", discounts, persistent=False)

    def forward(self, task: Tensor) -> Tensor:
        """Return embeddings [..., T] of task numbers [...]. Learned ones with a norm above 1 are first scaled to 1, in
        place, as `nn.Embedding(max_norm=1)` does, which on a GPU would wait for the host. An exported program scales
        what it looked up, because it cannot change its own weights."""
        if self.given:
            return F.embedding(task, self.weight)
        if fn.exporting():
            found = F.embedding(task, self.weight)
            return found * _shrinking(torch.linalg.vector_norm(found, dim=-1, keepdim=True))
        with torch.no_grad():
            asked = fn.one_hot(task.flatten(), len(self.weight)).any(0)
            norm = torch.linalg.vector_norm(self.weight, dim=1)
            self.weight.mul_(torch.where(asked, _shrinking(norm), 1.0).unsqueeze(1))
        return F.embedding(task, self.weight)


def _shrinking(norm: Tensor) -> Tensor:
    """Return the factors [...] that scale vectors of these norms [...] above 1 to 1."""
    return torch.where(norm > 1, 1 / (norm + 1e-7), 1.0)


def _dm_control(name: str) -> Task:
    return Task(name, next(size for family, size in _ACTIONS.items() if name.startswith(family)))


MT30 = tuple(map(_dm_control, _DM_CONTROL.split()))
MT80 = MT30 + tuple(Task(f"mw-{name}", 4, META_WORLD_STEPS) for name in _META_WORLD.split())
TASK_SETS = {"mt30": MT30, "mt80": MT80}


def multitask_sizes(size: str, task_set: str) -> dict[str, int]:
    """Return the config fields in which a published multi-task model differs from the single-task one of its size."""
    if task_set == "mt30" and size in ("5m", "19m", "48m"):
        return {"task_dim": 64, **({"latent_dim": 512} if size == "19m" else {})}
    return {"task_dim": 96}


def read_tasks(tasks: str | Sequence[Task | Mapping[str, Any]]) -> tuple[Task, ...]:
    """Return the tasks of a published set, or of a list of tasks or of mappings of their fields. Raises ValueError for
    an unknown set."""
    if isinstance(tasks, str):
        if tasks not in TASK_SETS:
            sets = " or ".join(TASK_SETS)
            raise ValueError(f"tasks is {tasks!r}, expected {sets}, or a list of Task(name, action_dim).")
        return TASK_SETS[tasks]
    return tuple(task if isinstance(task, Task) else Task(**task) for task in tasks)


def read_options(size: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config fields that these options set for a model of that size, and the options as it takes them."""
    if "tasks" not in options:
        return {}, dict(options)
    tasks, given = read_tasks(options["tasks"]), options["tasks"]
    fields = multitask_sizes(size, given) if isinstance(given, str) else {}
    return fields, {**options, "tasks": tasks}
