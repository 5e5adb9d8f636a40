"""The checks that a family of models has to pass."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from worldloom.contract import (
    ContractBroken,
    as_floats,
    check_actions,
    check_agent,
    check_description,
    check_model,
    require,
)
from worldloom.encoding import pack, unpack
from worldloom.families import agent_from_description, create_world_model
from worldloom.spaces import observation_shape
from worldloom.testing.subject import ENVS, Subject
from worldloom.types import Agent, Array, LatentState, WorldModel, join_obs, split_obs

VECTOR, CONTINUOUS = spaces.Box(-np.inf, np.inf, (3,), np.float32), spaces.Box(-1.0, 1.0, (2,), np.float32)
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Check:
    """One check's line of the table."""

    name: str
    wrong: str = ""  # what is wrong, as a sentence; empty if the check passed
    note: str = ""


def tensors(obs: Any) -> Any:
    return join_obs({name: torch.as_tensor(value) for name, value in split_obs(obs).items()})


def near(a: Any, b: Any) -> bool:
    first, second = torch.as_tensor(a).float(), torch.as_tensor(b).float()
    return first.shape == second.shape and torch.allclose(first, second, atol=TOLERANCE, rtol=TOLERANCE)


def parameters(agent: Agent) -> Tensor:
    modules = [agent.world_model, *([] if agent.behaviour is None else [agent.behaviour])]
    return torch.cat([p.detach().flatten().cpu() for module in modules for p in module.parameters()])


def act(agent: Agent, obs: Any, state: Any = None, first: Any = True, explore: bool = True) -> tuple[Array, Any]:
    """Call the agent's `act` with the same random draws each time."""
    agent.acting_generator.manual_seed(0)
    return agent.act(obs, state, np.broadcast_to(first, (ENVS,)).copy(), explore=explore)


# The checks. Each returns a note, often empty, or raises ContractBroken with a sentence


def is_a_world_model(subject: Subject) -> str:
    model, env = subject.agent().world_model, subject.environments()
    check_model(model, observation_shape(env.observation_space), env.action_dim)
    return f"{sum(p.numel() for p in model.parameters()):,} parameters"


def is_an_agent(subject: Subject) -> str:
    agent, env = subject.agent(), subject.environments()
    check_agent(agent, observation_shape(env.observation_space), env.action_dim)
    return f"windows of {agent.windows.length} rows, {agent.batch_size} in a batch"


def describes_itself(subject: Subject) -> str:
    found = subject.agent().describe()
    check_description(found)
    again = agent_from_description(json.loads(json.dumps(found))).describe()
    require(again == found, "an agent made from describe() returns another description, expected the same.")
    return f"family {found['family']}"


def has_states_of_one_shape(subject: Subject) -> str:
    agent = subject.agent()
    model, obs = cast(WorldModel, agent.world_model), tensors(subject.obs())
    action = torch.zeros(ENVS, subject.environments().action_dim)
    first = model.encode(obs)
    made = {
        "encode": first,
        "predict": model.predict(first, action),
        "observe": model.observe(first, action, obs),
        "initial_state": model.initial_state(ENVS),
    }
    for name, state in made.items():
        require(isinstance(state, LatentState), f"{name} gives a {type(state).__name__}, expected a LatentState.")
        for part in ("deterministic", "features"):
            value, expected = getattr(state, part), getattr(first, part)
            same = value.shape == expected.shape and len(value) == ENVS and value.dtype == torch.float32
            require(same, f"{name}: {part} is {value.dtype} {tuple(value.shape)}, encode's {tuple(expected.shape)}.")
        kept = {key: (value.dtype, tuple(value.shape)) for key, value in state.memory.items()}
        encoded = {key: (value.dtype, tuple(value.shape)) for key, value in first.memory.items()}
        require(kept == encoded, f"{name}: memory holds {kept}, encode's {encoded}.")
        lead = {key: shape[:1] for key, (_, shape) in kept.items() if shape[:1] != (ENVS,)}
        require(not lead, f"{name}: memory entries {sorted(lead)} have no axis of {ENVS} environments in front.")
    return f"{first.features.shape[-1]} features"


def decodes_and_imagines(subject: Subject) -> str:
    agent = subject.agent()
    model, obs = cast(WorldModel, agent.world_model), tensors(subject.obs())
    state, steps = model.encode(obs), 4
    decoded = model.decode(state)
    dream = model.imagine(state, torch.zeros(steps, ENVS, subject.environments().action_dim))
    require(len(dream.states) == steps + 1, f"imagine: {len(dream.states)} states for 4 actions, expected 5.")
    for name, value, shape in [
        ("decode: reward", decoded.get("reward"), (ENVS, 1)),
        ("decode: continue", decoded.get("continue"), (ENVS, 1)),
        ("imagine: rewards", dream.rewards, (steps, ENVS, 1)),
        ("imagine: continues", dream.continues, (steps, ENVS, 1)),
    ]:
        found = tuple(value.shape) if isinstance(value, Tensor) else value
        require(found == shape, f"{name} is {found}, expected {shape}.")
        if "continue" in name and isinstance(value, Tensor):
            require(bool(((value >= 0) & (value <= 1)).all()), f"{name} leaves [0, 1], expected a probability.")
    require("obs" in decoded, 'decode: "obs" is missing, expected the observation, or None without a decoder.')
    if decoded["obs"] is None:
        return "no decoder"
    for name, value in split_obs(decoded["obs"]).items():
        found, shape = tuple(value.shape), tuple(split_obs(obs)[name].shape)
        require(found[: len(shape)] == shape, f"decode: {name} is {found}, expected {shape}.")
    return ""


def has_a_loss(subject: Subject) -> str:
    agent = subject.agent()
    model = cast(nn.Module, agent.world_model)
    losses = agent.world_model.compute_loss(subject.batch(agent))
    require("loss" in losses, f'compute_loss gives {sorted(losses)}, expected "loss" among them.')
    wrong = [name for name, value in losses.items() if value.shape != () or not torch.isfinite(value)]
    require(not wrong, f"compute_loss: {', '.join(wrong)} is no finite scalar.")
    losses["loss"].backward()
    require(any(p.grad is not None and p.grad.any() for p in model.parameters()), "no parameter has a gradient.")
    return ", ".join(name for name in losses if name != "loss")


def acts(subject: Subject) -> str:
    agent, env = subject.agent(), subject.environments()
    note = ""
    for explore in (False, True):
        actions, state = act(agent, subject.obs(), explore=explore)
        most = check_actions(actions, ENVS, env.action_dim, env.action_classes)
        if most > 1:
            note = f"up to {most:.1f} of an unbounded distribution: environments cut it to [-1, 1]"
        lengths = {name: len(value) for name, value in state.items()}
        require(set(lengths.values()) <= {ENVS}, f"act_state has rows {lengths}, expected {ENVS} of each.")
        wrong = agent.replay_columns(state).keys() ^ agent.columns.keys()
        require(not wrong, f"replay_columns and columns differ in {sorted(wrong)}.")
    return note


def keeps_environments_apart(subject: Subject) -> str:
    """Check that no environment affects another, and that is_first resets the acting state."""
    agent = subject.agent()
    obs, others = split_obs(subject.obs()), split_obs(subject.obs(1))
    changed = {name: np.concatenate([value[:1], others[name][1:2], value[2:]]) for name, value in obs.items()}
    results = []
    for shown in (obs, changed):
        _, state = act(agent, join_obs(shown))
        results.append(act(agent, join_obs(shown), state, False))
    (a, state_a), (b, state_b) = results
    parts = {"actions": (a, b), **{name: (state_a[name], state_b[name]) for name in state_a}}
    for name, (one, two) in parts.items():
        require(near(one[::2], two[::2]), f"{name} of an environment depend on the observation of another one.")
    fresh, again = act(agent, join_obs(obs)), act(agent, join_obs(obs), state_b, True)
    require(near(fresh[0], again[0]), "act on is_first rows depends on the earlier acting state, expected a reset.")
    return ""


def follows_its_seed(subject: Subject) -> str:
    outcomes = []
    for other in (1, 2):
        agent = subject.agent()
        torch.manual_seed(other)  # the agent's draws are its own generators'
        acted = act(agent, subject.obs())[0]
        agent.update(subject.batch(agent))
        outcomes.append((acted, parameters(agent)))
    (acted, a), (again, b) = outcomes
    require(near(acted, again), "two agents of one seed act differently: draw from acting_generator alone.")
    require(near(a, b), "two agents of one seed differ after an update: draw from generators of the agent's own.")
    return ""


def learns_in_updates(subject: Subject) -> str:
    agent = subject.agent()
    batch, before, updates = subject.batch(agent), parameters(agent), agent.updates
    metrics, columns = agent.update(batch)
    require(agent.updates == updates + 1, f"updates went from {updates} to {agent.updates}, expected one more.")
    wrong = [name for name, value in as_floats(metrics).items() if not math.isfinite(value)]
    require(not wrong, f"metrics {', '.join(wrong)} are not finite.")
    require(columns.keys() <= agent.columns.keys(), f"update gives columns {sorted(columns)}, expected declared ones.")
    require(hasattr(agent.learn(batch), "arrays"), "learn gives no columns: return worldloom.staging.Columns({}).")
    require(bool(agent.collect()), "collect after learn gives no metrics.")
    same = torch.equal(before, parameters(agent))  # the first update may change nothing: learning rates warm up
    require(not same, "two updates change no parameter.")
    return f"{len(metrics)} metrics"


def saves_and_loads_its_model(subject: Subject) -> str:
    agent = subject.agent()
    agent.update(subject.batch(agent))
    with tempfile.TemporaryDirectory() as folder:
        agent.world_model.save_pretrained(folder)
        again = create_world_model(folder)
    require(again.__class__ is agent.world_model.__class__, f"the loaded model is a {type(again).__name__}.")
    found, expected = cast(nn.Module, again).state_dict(), agent.world_model.state_dict()
    same = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    require(same, "save_pretrained and create_world_model(directory) change parameters.")
    return ""


def goes_on_from_a_checkpoint(subject: Subject) -> str:
    agent, obs = subject.agent(), subject.obs()
    batch = subject.batch(agent)
    agent.update(batch)
    state = unpack(pack(agent.state_dict()))
    other = subject.agent(seed=1)
    other.load_state_dict(state)
    require(other.updates == agent.updates, "load_state_dict leaves `updates` as it was.")
    outcomes = []
    for each in (agent, other):
        each.update(batch)
        outcomes.append((parameters(each), each.act(obs, None, np.ones(ENVS, bool))[0]))
    (a, acted), (b, again) = outcomes
    require(near(a, b), "the update after load_state_dict differs: save optimisers, scales and generators too.")
    require(near(acted, again), "acting after load_state_dict differs: save acting_generator too.")
    return f"{len(pack(state)) / 2**20:.1f} MB"


def hands_on_its_acting_weights(subject: Subject) -> str:
    agent = subject.agent()
    obs = subject.obs()
    agent.update(subject.batch(agent))
    flat = agent.acting_weights()
    require(flat.dtype == np.float32 and flat.ndim == 1, f"acting_weights are {flat.dtype} {flat.shape}.")
    other = agent_from_description(agent.describe(), seed=1)
    other.load_acting_weights(flat.copy())
    for explore in (False, True):
        same = near(act(agent, obs, explore=explore)[0], act(other, obs, explore=explore)[0])
        require(same, "another agent with these acting_weights acts differently: something is left out of them.")
    _refuses(lambda: other.load_acting_weights(flat[1:]), "load_acting_weights takes weights of another length")
    return f"{flat.nbytes / 2**20:.2f} MB"


def _refuses(call: Callable[[], Any], sentence: str) -> None:
    try:
        call()
    except ValueError:
        return
    raise ContractBroken(f"{sentence}, expected a ValueError.")


def beats_chance(subject: Subject, updates: int) -> str:
    """Check that updates on random steps of `Mirror` lead to more than 0.3 a step; chance gives 0, the best is 1."""
    agent = subject.agent()
    replay, env = subject.replay(agent, 300, random=True), subject.environments()
    for _ in range(updates):
        batch = replay.sample(agent.batch_size)
        columns = agent.learn(batch).arrays()
        if columns:
            replay.write_back(batch["rows"].numpy(), columns)
    obs, state, first, total = env.reset(), None, np.ones(ENVS, bool), 0.0
    for _ in range(24):
        actions, state = agent.act(obs, state, first, explore=False)
        step = env.step(actions)
        obs, first, total = step.obs, step.is_first, total + float(step.rewards.mean()) / 24
    require(total > 0.3, f"{updates} updates on a task of two states give {total:.2f} a step; chance is 0, the best 1.")
    return f"{total:.2f} a step after {updates} updates; chance is 0, the best 1"


CHECKS: dict[str, Callable[[Subject], str]] = {
    check.__name__.replace("_", " "): check
    for check in (
        is_a_world_model,
        is_an_agent,
        describes_itself,
        has_states_of_one_shape,
        decodes_and_imagines,
        has_a_loss,
        acts,
        keeps_environments_apart,
        follows_its_seed,
        learns_in_updates,
        saves_and_loads_its_model,
        goes_on_from_a_checkpoint,
        hands_on_its_acting_weights,
    )
}


def check_family(
    model: str,
    observation_space: spaces.Space[Any] = VECTOR,
    action_space: spaces.Space[Any] = CONTINUOUS,
    updates: int = 0,
    **overrides: Any,
) -> list[Check]:
    """Check a family, such as "my_package.my_family:tiny"; print a table of the results and return it.

    observation_space, action_space: Gymnasium spaces that the family has to support. updates: if above 0, the family
    also has to beat chance on a task of two states after so many updates; a planner needs some hundreds. overrides:
    fields of its config; with a small model the checks take seconds. Raises AssertionError with a sentence for each
    check that fails.
    """
    subject = Subject(model, observation_space, action_space, overrides)
    subject.agent()  # raises its own error if the agent cannot be made
    found = []
    asked = dict(CHECKS)
    if updates:
        asked["beats chance"] = partial(beats_chance, updates=updates)
    for name, check in asked.items():
        try:
            found.append(Check(name, note=check(subject)))
        except ContractBroken as error:
            found.append(Check(name, str(error)))
        except Exception as error:  # in the family's code; the other checks still run
            found.append(Check(name, f"{type(error).__name__}: {error}"))
    for line in found:
        print(f"{'FAILS' if line.wrong else 'ok':6}{line.name:30}{line.wrong or line.note}")
    if wrong := [f"{line.name}: {line.wrong}" for line in found if line.wrong]:
        raise AssertionError(f"{model} fails {len(wrong)} of {len(found)} checks.\n" + "\n".join(wrong))
    return found
