"""Environments behind one contract: any Gymnasium id, its actions in [-1, 1] or one-hot, its images channel-first."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import gymnasium
import numpy as np

from worldloom.spaces import ActionCodec, ObservationCodec
from worldloom.suites import DM_CONTROL_STEPS, AtariConfig, DMCConfig, make_atari, make_dm_control
from worldloom.types import Array, ObsArray, join_obs, split_obs

logger = logging.getLogger(__name__)

FAILURES_ALLOWED = 5  # of one environment within FAILURE_WINDOW of its steps, before the run is given up
FAILURE_WINDOW = 100


class EnvironmentFailed(RuntimeError):
    """An environment failed again and again; the last failure is the cause."""


class Environment:
    """One Gymnasium environment under the contract; actions are [A], observations [*obs_shape] or a mapping of them.

    observation_space: images uint8 (C, H, W), vectors float32, class indices; or a Dict of these. action_space: Box in
    [-1, 1] of shape (A,), or Discrete and MultiDiscrete, whose actions are given one-hot (see `worldloom.spaces`).
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        action_repeat: int = 1,
        episode_length: int | None = None,
        frame_stack: int = 1,
        image_size: int | None = None,
    ) -> None:
        if action_repeat < 1:
            raise ValueError(f"env.action_repeat is {action_repeat}, expected at least 1.")
        self._env, self._repeat = env, action_repeat
        self.name = env.spec.id if env.spec else type(env.unwrapped).__name__
        self._actions = ActionCodec(self.name, env.action_space)
        self._observations = ObservationCodec(self.name, env.observation_space, frame_stack, image_size)
        self.action_dim, self.action_classes = self._actions.size, self._actions.classes
        self.action_space, self.observation_space = self._actions.space, self._observations.space
        limit = env.spec.max_episode_steps if env.spec else None
        steps = None if limit is None else math.ceil(limit / action_repeat)
        self.episode_length = episode_length or steps  # in agent steps, None where there is no limit

    def reset(self, seed: int | None = None) -> ObsArray:
        obs, _ = self._env.reset(seed=seed)
        return self._observations(obs, first=True)

    def step(self, action: Array) -> tuple[ObsArray, float, bool, bool]:
        """Repeat `action` [A] and sum the rewards: (obs, reward, terminated, truncated)."""
        native, total, terminated, truncated = self._actions.native(action), 0.0, False, False
        for _ in range(self._repeat):
            obs, reward, terminated, truncated, _ = self._env.step(native)
            total += float(reward)
            if terminated or truncated:
                break
        if not math.isfinite(total):
            raise ValueError(f"{self.name} gave reward {total}, expected a finite number. Check its reward function.")
        return self._observations(obs), total, bool(terminated), bool(truncated)

    def step_once(self) -> None:
        """Reset and take one step in the middle of the action space: what is broken shows here, before a run starts."""
        self.reset(seed=0)
        middle = np.zeros(self.action_dim, np.float32)
        self.step(middle)

    def render(self) -> Array:
        """An RGB frame [H, W, 3] uint8; needs make_env(..., render_mode="rgb_array")."""
        return np.asarray(self._env.render())

    @property
    def frames_per_second(self) -> float:
        """Steps a second in the environment's own time; 30 where it does not say."""
        return float(self._env.metadata.get("render_fps") or 30) / self._repeat

    def close(self) -> None:
        self._env.close()


@dataclass(frozen=True)
class Step:
    """What one step of E environments gave, in Gymnasium's order: these came out of the actions just taken."""

    obs: ObsArray  # [E, *obs_shape] (or a mapping) to act on next: of the new episode where one ended
    final_obs: ObsArray  # [E, *obs_shape] that the action led to; equals obs where no episode ended
    rewards: Array  # [E] float32
    terminated: Array  # [E] bool
    truncated: Array  # [E] bool
    failed: Array  # [E] bool: the step raised; the environment was rebuilt and its episode cut short before it

    @property
    def is_first(self) -> Array:
        """[E] bool: obs starts an episode."""
        return cast(Array, self.terminated | self.truncated | self.failed)


class VectorEnv:
    """E environments stepped together; those that end are reset in the same step.

    An environment that raises is rebuilt in its place. One that fails over and over ends the run with
    `EnvironmentFailed`, caused by its last error.
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
        one = self._envs[0]
        self.observation_space, self.action_space = one.observation_space, one.action_space
        self.action_classes, self.action_dim, self.episode_length = (
            one.action_classes,
            one.action_dim,
            one.episode_length,
        )
        self.name = one.name

    def reset(self) -> ObsArray:
        """Start every environment: obs [E, *obs_shape], or a mapping of such."""
        return _stack([self._reset(index) for index in range(self.num_envs)])

    def step(self, actions: Array) -> Step:
        """actions: [E, A]. Raises ValueError for another shape, EnvironmentFailed for a broken environment."""
        if actions.shape != (self.num_envs, self.action_dim):
            raise ValueError(
                f"{self.name}: actions are {actions.shape}, expected {(self.num_envs, self.action_dim)}: [E, A]."
            )
        if not np.isfinite(actions).all():
            raise FloatingPointError(
                f"{self.name}: the agent gave actions that are NaN or infinite, so its parameters are. Lower agent.lr, "
                "or go on from the last checkpoint with --resume."
            )
        self._steps += 1
        obs: list[ObsArray] = []
        final_obs: list[ObsArray] = []
        rewards = np.zeros(self.num_envs, np.float32)
        terminated, truncated, failed = np.zeros((3, self.num_envs), bool)
        for i, env in enumerate(self._envs):
            arrived: ObsArray | None = None
            try:
                arrived, rewards[i], terminated[i], truncated[i] = env.step(actions[i])
            except Exception as error:
                self._rebuild(i, error)
                failed[i] = True
            if arrived is None or terminated[i] or truncated[i]:
                obs.append(self._reset(i))
            else:
                obs.append(arrived)
            final_obs.append(obs[-1] if arrived is None else arrived)
        return Step(_stack(obs), _stack(final_obs), rewards, terminated, truncated, failed)

    def render(self) -> Array:
        """The first environment's frame [H, W, 3] uint8."""
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
                return self._envs[index].reset(seed=int(self._seeds[index].integers(2**31)))
            except Exception as error:
                self._rebuild(index, error)

    def _rebuild(self, index: int, error: Exception) -> None:
        """Replace a broken environment, unless it broke too often."""
        recent = self._failures[index]
        recent.append(self._steps)
        self.failures += 1
        self.last_failure = f"{type(error).__name__}: {error}".rstrip(".")
        if len(recent) == FAILURES_ALLOWED and self._steps - recent[0] < FAILURE_WINDOW:
            raise EnvironmentFailed(
                f"environment {index} ({self.name}) failed {FAILURES_ALLOWED} times within {FAILURE_WINDOW} steps; "
                f"the last time: {self.last_failure}. Mend the environment, then --resume."
            ) from error
        logger.warning("environment %d (%s) raised and was rebuilt: %r", index, self.name, error)
        try:
            self._envs[index].close()
        except Exception as closing:  # a broken environment may not close either; it is replaced anyway
            logger.warning("environment %d could not be closed: %r", index, closing)
        self._envs[index] = self._make()


def _stack(observations: Sequence[ObsArray]) -> ObsArray:
    columns = [split_obs(obs) for obs in observations]
    stacked: ObsArray = join_obs({name: np.stack([c[name] for c in columns]) for name in columns[0]})
    return stacked


def make_environment(
    env_id: str,
    action_repeat: int = 1,
    render_mode: str | None = None,
    atari: AtariConfig | None = None,
    dmc: DMCConfig | None = None,
    frame_stack: int = 1,
    image_size: int | None = None,
) -> Environment:
    """One environment. Raises ValueError for an unknown id, naming the nearest; see `make_env` for several."""
    try:
        if env_id.startswith("ALE/"):  # frames are repeated and pooled together
            game = make_atari(env_id, atari or AtariConfig(), action_repeat, render_mode)
            length = (atari or AtariConfig()).max_frames // action_repeat
            return Environment(game, episode_length=length, frame_stack=frame_stack, image_size=image_size)
        if env_id.startswith("dm_control/"):
            task = make_dm_control(env_id, dmc or DMCConfig(), render_mode)
            length = math.ceil(DM_CONTROL_STEPS / action_repeat)
            return Environment(task, action_repeat, length, frame_stack, image_size)
        options: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
        factory = _factory(env_id)
        if factory is not None:
            made = _call(factory, env_id, options)
        else:
            made = gymnasium.make(env_id, disable_env_checker=True, **options)
        return Environment(made, action_repeat, frame_stack=frame_stack, image_size=image_size)
    except gymnasium.error.Error as error:
        raise ValueError(f"env.id is {env_id!r}, which Gymnasium cannot make: {error} {_nearest(env_id)}") from error
    except ModuleNotFoundError as error:
        raise ValueError(
            f"env.id is {env_id!r}, which cannot be imported: {error} Install that module, or correct the id."
        ) from error


def _factory(env_id: str) -> Callable[..., Any] | None:
    """What "module:name" names; None for ids, of which "module:Name-v0" says where they are registered."""
    module, _, name = env_id.partition(":")
    if not name or re.search(r"-v\d+$", name):
        return None
    found = getattr(importlib.import_module(module), name, None)
    if not callable(found):
        raise ValueError(
            f"env.id is {env_id!r}, but {module} has no function or class {name!r}. Expected module:factory, which "
            "returns a gymnasium.Env, or the id of a registered environment."
        )
    return cast(Callable[..., Any], found)


def _call(factory: Callable[..., Any], env_id: str, options: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    """factory(), with render_mode where it takes one."""
    taken = {name: value for name, value in options.items() if name in inspect.signature(factory).parameters}
    made = factory(**taken)
    if not isinstance(made, gymnasium.Env):
        raise TypeError(f"{env_id} returned a {type(made).__name__}, expected a gymnasium.Env.")
    return made


def make_env(
    env_id: str,
    num_envs: int = 1,
    seed: int = 0,
    action_repeat: int = 1,
    render_mode: str | None = None,
    atari: AtariConfig | None = None,
    dmc: DMCConfig | None = None,
    frame_stack: int = 1,
    image_size: int | None = None,
) -> VectorEnv:
    """num_envs environments of a Gymnasium id ("Pendulum-v1", "module:Name-v0"), of a function or class that makes
    one ("module:factory"), of Atari ("ALE/Pong-v5") or of DeepMind Control ("dm_control/walker-walk-v0"; atari and dmc
    say how these look).

    Rewards are summed over action_repeat; images come with the frame_stack - 1 before them, the oldest first, resized
    to squares of side image_size. Raises ValueError for an unknown id, TypeError for spaces that `worldloom.spaces`
    cannot convert.
    """
    return VectorEnv(
        lambda: make_environment(env_id, action_repeat, render_mode, atari, dmc, frame_stack, image_size),
        num_envs,
        seed,
    )


def _nearest(env_id: str) -> str:
    import difflib

    near = difflib.get_close_matches(env_id, gymnasium.registry, n=3)
    return f"Did you mean {' or '.join(near)}?" if near else "gymnasium.pprint_registry() lists the known ids."
