"""Schedules: updates in proportion to environment steps, and everything that happens at intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SETTINGS = ("train_ratio", "replayed_per_update", "learning_starts", "pretrain")


class RateLimiter:
    """Keeps the train ratio: replayed steps per environment (policy) step.

    Environment steps count once replay has accepted them, updates once the learner has finished them. Learning starts
    after `learning_starts` steps, and once replay holds a complete window (`drawable`).
    replayed_per_update: B times the trained steps of a window. pretrain: updates are also owed for the steps of the
    warm-up, in one burst when learning starts, as TD-MPC2 does.
    """

    def __init__(self, train_ratio: float, replayed_per_update: int, learning_starts: int, pretrain: bool) -> None:
        self.train_ratio, self.replayed_per_update = train_ratio, replayed_per_update
        self.learning_starts, self.pretrain = learning_starts, pretrain
        self.env_steps = 0
        self.updates = 0
        self.drawable = True
        self._ahead = 0.0  # updates made under earlier settings, minus those that the present settings would owe

    @property
    def updates_per_step(self) -> float:
        return self.train_ratio / self.replayed_per_update

    @property
    def learning(self) -> bool:
        return self.drawable and self.env_steps >= self.learning_starts

    @property
    def counted_steps(self) -> int:
        """Environment steps that updates are owed for."""
        return self._counted(self.env_steps)

    def _counted(self, env_steps: int) -> int:
        return env_steps if self.pretrain else max(env_steps - self.learning_starts, 0)

    def updates_due(self) -> int:
        """Return the updates owed now; 0 until learning starts."""
        if not self.learning:
            return 0
        return self.updates_left(self.env_steps)

    def updates_left(self, total_steps: int) -> int:
        """Return the updates still to be made by the time that `total_steps` are accepted."""
        return max(math.floor(self._owed_at(total_steps) + 1e-9) - self.updates, 0)

    def owed(self) -> float:
        """Return the updates that are owed for all steps so far."""
        return self._owed_at(self.env_steps)

    def _owed_at(self, env_steps: int) -> float:
        return self._counted(env_steps) * self.train_ratio / self.replayed_per_update + self._ahead

    def steps_ahead(self, under_way: int = 0) -> float:
        """Return how many environment steps collecting is ahead of the learner; 0 until learning starts.

        under_way: steps that were collected and are not accepted yet.
        """
        if not self.learning:
            return 0.0
        return max(self.counted_steps + under_way - (self.updates - self._ahead) / self.updates_per_step, 0.0)

    @property
    def actual(self) -> float:
        """Replayed steps per counted environment step so far; 0 before the first."""
        return (self.updates - self._ahead) * self.replayed_per_update / max(self.counted_steps, 1)

    def describe(self) -> str:
        """Describe the ratio in all the usual units."""
        per_step = self.updates_per_step
        many = "1 update" if per_step == 1 else f"{per_step:g} updates"
        updates = f"{many} a step" if per_step >= 1 else f"1 update every {1 / per_step:g} steps"
        return (
            f"train ratio {self.train_ratio:g}: {self.train_ratio:g} replayed steps per environment step, "
            f"{updates} ({self.replayed_per_update} steps in a batch), from step {self.learning_starts:,} on"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return both totals and the settings."""
        return {
            "env_steps": self.env_steps,
            "updates": self.updates,
            "train_ratio": self.train_ratio,
            "replayed_per_update": self.replayed_per_update,
            "learning_starts": self.learning_starts,
            "pretrain": self.pretrain,
            "ahead": self._ahead,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load both totals, so that a resume owes no update that was not owed before. Changed settings apply only to
        the steps that follow."""
        self.env_steps, self.updates = int(state["env_steps"]), int(state["updates"])
        self._ahead = float(state["ahead"])
        kept_by = {name: value for name, value in self.state_dict().items() if name in SETTINGS}
        if any(state[name] != value for name, value in kept_by.items()):
            self._ahead = 0.0
            self._ahead = self.updates - self.owed() if self.learning or self.updates else 0.0


class Every:
    """A schedule that is due once for each multiple of `interval` steps that is reached; never if the interval is 0."""

    def __init__(self, interval: int, start: int = 0) -> None:
        self._interval = interval
        self._done = start // interval if interval else 0

    def due(self, step: int) -> bool:
        if not self._interval or step // self._interval <= self._done:
            return False
        self._done = step // self._interval
        return True
