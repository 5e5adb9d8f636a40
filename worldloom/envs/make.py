"""Environments by name: from any Gymnasium id, factory or suite."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable
from typing import Any, cast

import gymnasium

from worldloom.envs.environment import Environment
from worldloom.envs.suites import DM_CONTROL_STEPS, AtariConfig, DMCConfig, make_atari, make_dm_control
from worldloom.envs.vector import VectorEnv
from worldloom.extras import missing_extra
from worldloom.nearest import nearest


def make_environment(
    env_id: str,
    action_repeat: int = 1,
    render_mode: str | None = None,
    atari: AtariConfig | None = None,
    dmc: DMCConfig | None = None,
    frame_stack: int = 1,
    image_size: int | None = None,
) -> Environment:
    """Make one environment; see `make_env` for several. Raises ValueError for an unknown id, with the nearest ids."""
    try:
        if env_id.startswith("ALE/"):  # make_atari repeats the actions
            game = make_atari(env_id, atari or AtariConfig(), action_repeat, render_mode)
            length = (atari or AtariConfig()).max_frames // action_repeat
            marks = atari is not None and atari.life_loss == "mark"
            return Environment(game, 1, length, frame_stack, image_size, marks)
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
        if hint := missing_extra(error):
            raise ValueError(f"env.id is {env_id!r}, but {hint}") from error
        said = str(error).partition(" Did you mean")[0]  # Gymnasium leaves out versions
        raise ValueError(f"env.id is {env_id!r}, which Gymnasium cannot make: {said} {_nearest(env_id)}") from error
    except ModuleNotFoundError as error:
        if hint := missing_extra(error):
            raise ValueError(f"env.id is {env_id!r}, but {hint}") from error
        raise ValueError(
            f"env.id is {env_id!r}, which cannot be imported: {error} Install that module, or correct the id."
        ) from error


def _factory(env_id: str) -> Callable[..., Any] | None:
    """Return the function or class that "module:name" names; None for ids, "module:Name-v0" included."""
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
    """Call the factory, with render_mode if it takes one. Raises TypeError if the result is no gymnasium.Env."""
    parameters = inspect.signature(factory).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    taken = {name: value for name, value in options.items() if takes_all or name in parameters}
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
    """Make num_envs environments.

    env_id: a Gymnasium id ("Pendulum-v1", "module:Name-v0"), a function or class that makes an environment
    ("module:factory"), an Atari game ("ALE/Pong-v5", with settings `atari`) or a task of DeepMind Control
    ("dm_control/walker-walk-v0", with settings `dmc`). action_repeat: frames per step; their rewards are summed.
    frame_stack: images per observation, the oldest first. image_size: side of the square to which images are resized.
    Raises ValueError for an unknown id, TypeError for spaces that `worldloom.spaces` cannot convert.
    """
    return VectorEnv(
        lambda: make_environment(env_id, action_repeat, render_mode, atari, dmc, frame_stack, image_size),
        num_envs,
        seed,
    )


def _nearest(env_id: str) -> str:
    near = nearest(env_id, gymnasium.registry, 3)
    return f"Did you mean {' or '.join(near)}?" if near else "gymnasium.pprint_registry() lists the known ids."
