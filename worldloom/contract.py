"""The contract between the library and a family's agent, as far as a run can check it at its start.

`worldloom.testing.check_family` tests the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worldloom.types import Agent, Array, Description, Metrics, ObsArray, ObsShape, WorldModel

REACH = 6.0  # draws of a normal with mean in [-1, 1] and std of at most 1 practically never reach it
STATE_TYPES = (Tensor, np.ndarray, np.generic, str, bytes, bool, int, float, type(None))


class ContractBroken(TypeError):
    """The error of a family that breaks the contract; its message says what to add."""


def require(holds: bool, sentence: str) -> None:
    """Check a condition. Raises ContractBroken with `sentence` where it does not hold."""
    if not holds:
        raise ContractBroken(sentence)


def check_agent(agent: Agent, obs_shape: ObsShape, action_dim: int) -> None:
    """Check an agent's members, shapes, description and state. Raises ContractBroken, which says what to add."""
    check_model(getattr(agent, "world_model", None), obs_shape, action_dim)
    lacking = sorted(name for name in members(Agent) if not hasattr(agent, name))
    require(not lacking, f"the agent has no {', '.join(lacking)}; see worldloom.types.Agent.")
    check_description(agent.describe())
    check_state(agent)


def check_model(model: Any, obs_shape: ObsShape, action_dim: int) -> None:
    """Check that `model` is an nn.Module with the members of `WorldModel` and these sizes. Raises ContractBroken."""
    require(isinstance(model, nn.Module), f"the world model is a {type(model).__name__}, expected a torch.nn.Module.")
    lacking = sorted(name for name in members(WorldModel) if not hasattr(model, name))
    require(not lacking, f"the model has no {', '.join(lacking)}; see worldloom.types.WorldModel.")
    for name, expected in [("obs_shape", obs_shape), ("action_dim", action_dim)]:
        found = getattr(model, name)
        require(found == expected, f"the model's {name} is {found}, expected {expected}, the one given to it.")


def members(protocol: type) -> set[str]:
    """Return the public names that a Protocol requires."""
    return {name for name in {*vars(protocol), *protocol.__annotations__} if not name.startswith("_")}


def check_description(found: Any) -> None:
    """Check that a description has the keys of `Description`, in JSON's types. Raises ContractBroken."""
    require(isinstance(found, dict), f"describe() gives a {type(found).__name__}, expected a dict.")
    lacking = sorted(Description.__required_keys__ - found.keys())
    require(not lacking, f"describe() lacks {', '.join(lacking)}.")
    try:
        same = json.loads(json.dumps(found)) == found
    except TypeError as error:
        raise ContractBroken(f"describe() holds more than JSON's types: {error}.") from error
    require(same, "describe() holds more than JSON's types: make tuples lists, and keys strings.")


def check_state(agent: Agent) -> None:
    """Check that a checkpoint can hold the agent's state, with its number of updates. Raises ContractBroken."""
    state = agent.state_dict()
    require("updates" in state, 'state_dict() has no "updates", expected the number of updates so far.')
    wrong = next(_wrong_parts(state, "state_dict()"), None)
    require(wrong is None, f"{wrong}, expected tensors, arrays, numbers, strings, lists and dicts of them.")


def _wrong_parts(value: Any, path: str) -> Any:
    """Yield a phrase for each part of `value` that cannot be written to a checkpoint."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            if not isinstance(key, (str, int)):
                yield f"{path} has a key that is a {type(key).__name__}"
            yield from _wrong_parts(part, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _wrong_parts(part, f"{path}[{index}]")
    elif not isinstance(value, STATE_TYPES):
        yield f"{path} is a {type(value).__name__}"


def check_acting(agent: Agent, obs: ObsArray, action_dim: int, action_classes: Sequence[int]) -> None:
    """Let the agent act once on obs [1, ...], then restore its generator. Raises ContractBroken for wrong results."""
    before = agent.acting_generator.get_state()
    with torch.random.fork_rng(devices=[]):
        actions, state = agent.act(obs, None, np.ones(1, bool))
    agent.acting_generator.set_state(before)
    check_actions(actions, 1, action_dim, action_classes)
    lengths = {name: len(value) for name, value in state.items()}
    require(set(lengths.values()) <= {1}, f"act_state has rows {lengths} for one environment, expected 1 of each.")
    given, declared = agent.replay_columns(state).keys(), agent.columns.keys()
    require(given == declared, f"replay_columns and columns differ in {sorted(given ^ declared)}.")


def check_actions(actions: Any, envs: int, action_dim: int, action_classes: Sequence[int]) -> float:
    """Check actions [E, A] and return their largest absolute entry.

    They are one-hot parts, or lie in [-1, 1], or come from a normal with its mean in [-1, 1]. Such a normal may stay
    unclipped, as DreamerV3's does: environments clip what they get. Raises ContractBroken for other actions.
    """
    good = isinstance(actions, np.ndarray) and actions.dtype == np.float32 and actions.shape == (envs, action_dim)
    found = f"{actions.dtype} {actions.shape}" if isinstance(actions, np.ndarray) else type(actions).__name__
    require(good, f"act gives {found}, expected a float32 array {(envs, action_dim)}.")
    if action_classes:
        parts: list[Array] = np.split(actions, np.cumsum(action_classes)[:-1], 1)
        one_hot = all(np.array_equal(np.sort(p, 1)[:, ::-1], np.eye(1, p.shape[1]).repeat(envs, 0)) for p in parts)
        require(one_hot, f"act gives {actions[0]}, expected a one-hot for each of {tuple(action_classes)}.")
    most = float(np.abs(actions).max())
    require(most < REACH, f"act gives {actions[0]}, expected entries in [-1, 1], or a normal around them.")
    return most


def as_floats(metrics: Mapping[str, Any]) -> Metrics:
    """Return metrics as plain floats. Raises ContractBroken for any that is neither a float nor a one-number tensor."""
    try:
        return {name: float(value) for name, value in metrics.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        wrong = next(name for name, value in metrics.items() if not _is_number(value))
        shown = type(metrics[wrong]).__name__
        raise ContractBroken(
            f"the metric {wrong!r} is a {shown}, expected a float or a tensor of one number."
        ) from error


def _is_number(value: Any) -> bool:
    try:
        float(value)
        return True
    except (TypeError, ValueError, RuntimeError):
        return False
