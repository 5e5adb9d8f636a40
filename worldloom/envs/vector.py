"""Several environments stepped together; one that fails is rebuilt."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import gymnasium
import numpy as np

from worldloom.envs.environment import Environment
from worldloom.interrupt import is_ctrl_c
from worldloom.types import Array, ObsArray, join_obs, split_obs

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

FAILURES_ALLOWED = 5  # so many failures of one environment within FAILURE_WINDOW steps end the run
FAILURE_WINDOW = 100
FAILURES = (Exception, SystemExit)  # a simulator that calls sys.exit has failed, too


class EnvironmentFailed(RuntimeError):
    """An environment failed in its first step or too often; its last error is the cause."""


def guarded(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function of an environment. Raises RuntimeError in place of a KeyboardInterrupt that is not the user's, so
    that it counts as a failure."""
    try:
        return function(*args, **kwargs)
    except KeyboardInterrupt as error:
        if is_ctrl_c(error):
            raise
        raise RuntimeError("the environment raised KeyboardInterrupt") from error


@dataclass(frozen=True)
class Step:
    """The result of one step of E environments, in Gymnasium's order: everything follows the actions just taken."""

    obs: ObsArray  # [E, *obs_shape] (or a mapping) to act on next: of the new episode where one ended
    final_obs: ObsArray  # [E, *obs_shape] that the action led to; equals obs where no episode ended
    rewards: Array  # [E] float32
    terminated: Array  # [E] bool
    truncated: Array  # [E] bool
    failed: Array  # [E] bool: the step raised an error; the environment was rebuilt, its episode ends before the step
    life_lost: Array  # [E] bool: a life was lost in a game that goes on; only of environments that mark lives

    @property
    def is_first(self) -> Array:
        """Flags [E] bool: obs starts an episode."""
        return cast(Array, self.terminated | self.truncated | self.failed)


class VectorEnv:
    """E environments stepped together; one whose episode ends is reset in the same step.

    An environment that raises an error is rebuilt. One that fails too often ends the run with `EnvironmentFailed`,
    whose cause is its last error.
    """

    def __init__(self, make: Callable[[], Environment], num_envs: int, seed: int) -> None:
        if num_envs < 1:
            raise ValueError(f"env.num_envs is {num_envs}, expected at least 1.")
        self._make = make
        self._seeds = [np.random.default_rng([seed, index]) for index in range(num_envs)]
        self._envs = [make() for _ in range(num_envs)]
        self._steps = 0
        self._failures: list[deque[int]] = [deque(maxlen=FAILURES_ALLOWED) for _ in self._envs]
        self.num_envs, self.failures, self.last_failure = num_envs, 0, ""

    @property
    def name(self) -> str:
        return self._envs[0].name

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        return self._envs[0].observation_space

    @property
    def action_space(self) -> gymnasium.Space[Any]:
        return self._envs[0].action_space

    @property
    def action_classes(self) -> tuple[int, ...]:
        """Number of choices of each part of a one-hot action; () for continuous actions."""
        return self._envs[0].action_classes

    @property
    def marks_lives(self) -> bool:
        """Return whether lost lives are marked, in `Step.life_lost`."""
        return self._envs[0].marks_lives

    @property
    def action_dim(self) -> int:
        return self._envs[0].action_dim

    @property
    def episode_length(self) -> int | None:
        """Agent steps after which every episode is cut; None if there is no limit."""
        return self._envs[0].episode_length

    def reset(self) -> ObsArray:
        """Reset every environment and return obs [E, *obs_shape], or a mapping of such."""
        return _stack([self._reset(index) for index in range(self.num_envs)])

    def step(self, actions: Array) -> Step:
        """Step every environment with actions [E, A].

        Raises ValueError for another shape, FloatingPointError for actions that are not finite, EnvironmentFailed for
        an environment that fails too often.
        """
        if actions.shape != (self.num_envs, self.action_dim):
            raise ValueError(
                f"{self.name}: actions are {actions.shape}, expected {(self.num_envs, self.action_dim)}: [E, A]."
            )
        if not np.isfinite(actions).all():
            raise FloatingPointError(
                f"{self.name}: the agent gave NaN or infinite actions, so its parameters are NaN or infinite. Lower "
                "agent.lr, or go on from the last checkpoint with --resume."
            )
        self._steps += 1
        obs: list[ObsArray] = []
        final_obs: list[ObsArray] = []
        rewards = np.zeros(self.num_envs, np.float32)
        terminated, truncated, failed, lost = np.zeros((4, self.num_envs), bool)
        for i, env in enumerate(self._envs):
            arrived: ObsArray | None = None
            try:
                arrived, rewards[i], terminated[i], truncated[i] = guarded(env.step, actions[i])
                lost[i] = env.life_lost and not terminated[i]
            except FAILURES as error:
                self._rebuild(i, error)
                failed[i] = True
            if arrived is None or terminated[i] or truncated[i]:
                obs.append(self._reset(i))
            else:
                obs.append(arrived)
            final_obs.append(obs[-1] if arrived is None else arrived)
        return Step(_stack(obs), _stack(final_obs), rewards, terminated, truncated, failed, lost)

    def render(self) -> Array:
        """Return the first environment's frame [H, W, 3] uint8."""
        return self._envs[0].render()

    @property
    def frames_per_second(self) -> float:
        return self._envs[0].frames_per_second

    def close(self) -> None:
        for env in self._envs:
            env.close()

    def _reset(self, index: int) -> ObsArray:
        while True:
            try:
                return guarded(self._envs[index].reset, seed=int(self._seeds[index].integers(2**31)))
            except FAILURES as error:
                self._rebuild(index, error)

    def _rebuild(self, index: int, error: BaseException) -> None:
        """Replace an environment that failed. Raises EnvironmentFailed if it failed too often."""
        self._count_failure(index, error)
        try:
            guarded(self._envs[index].close)
        except FAILURES as closing:  # a broken environment may not close either; it is replaced anyway
            logger.warning("environment %d could not be closed: %r", index, closing)
        while True:
            try:
                self._envs[index] = guarded(self._make)
                return
            except FAILURES as again:
                self._count_failure(index, again)

    def _count_failure(self, index: int, error: BaseException) -> None:
        """Raises EnvironmentFailed if the environment failed too often."""
        recent = self._failures[index]
        recent.append(self._steps)
        self.failures += 1
        self.last_failure = f"{type(error).__name__}: {error}".rstrip(".")
        if len(recent) == FAILURES_ALLOWED and self._steps - recent[0] < FAILURE_WINDOW:
            raise EnvironmentFailed(
                f"environment {index} ({self.name}) failed {FAILURES_ALLOWED} times within {FAILURE_WINDOW} steps; "
                f"the last error: {self.last_failure}. Fix the environment, then go on with --resume."
            ) from error
        logger.warning("environment %d (%s) raised an error and is rebuilt: %r", index, self.name, error)


def _stack(observations: Sequence[ObsArray]) -> ObsArray:
    columns = [split_obs(obs) for obs in observations]
    stacked: ObsArray = join_obs({name: np.stack([c[name] for c in columns]) for name in columns[0]})
    return stacked
