"""The start of a run from a trained agent: fine-tuning.

The network's configuration and weights come from the checkpoint; optimisers, counters and replay are new. A multi-task
model becomes one of the run's task alone (Hansen et al. 2024, "few-shot learning").
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from worldloom.envs.suites import paper_name
from worldloom.families import ACTION_CLASSES, OBS_CLASSES, build_config, find_family, load_agent, resolve
from worldloom.family import Family
from worldloom.locations import is_file, locate
from worldloom.runs.agent_state import AgentSnapshot, take_agent, write_agent
from worldloom.runs.config import RunConfig
from worldloom.spaces import action_classes, observation_shape
from worldloom.types import Agent, ObsShape

FOLDER = "start"  # of a run: the agent that it began with


class Spaces(Protocol):
    """Names what a run knows of its environment; see `worldloom.runs.build.EnvSpec`."""

    @property
    def observation_space(self) -> Any: ...
    @property
    def action_space(self) -> Any: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def episode_length(self) -> int | None: ...


@runtime_checkable
class SeveralTasks(Protocol):
    """The further methods of a model that knows several tasks."""

    tasks: Sequence[Any]

    def for_task(
        self, name: str, like: str, obs_shape: ObsShape, action_dim: int, episode_length: int | None
    ) -> nn.Module:
        """Return a copy that knows one task alone. Raises ValueError if it does not fit."""


def read_start(config: RunConfig, env: Spaces) -> AgentSnapshot:
    """Return the trained agent of `start.checkpoint`, fitted to the environment of the run.

    Raises ValueError that names what does not fit, FileNotFoundError for a checkpoint that is not there.
    """
    source = str(config.start.checkpoint)
    agent = _load(config, source, observation_shape(env.observation_space))
    taken, model = dataclasses.replace(take_agent(agent), state={}), agent.world_model  # optimisers begin anew
    like, shape = _like(config, model, source), observation_shape(env.observation_space)
    several = len(getattr(model, "tasks", ())) > 1  # a model of one task reads what that task shows, and no more
    if like is not None and (several or (model.obs_shape, model.action_dim) == (shape, env.action_dim)):
        model = model.for_task(config.env.id, like, shape, env.action_dim, env.episode_length)
        taken = dataclasses.replace(taken, description=model.describe(), model=model.state_dict())
    _check_fits(config, taken.description, model, env)
    return taken


def _load(config: RunConfig, source: str, obs_shape: ObsShape) -> Agent:
    if not is_file(locate(source)):
        return load_agent(source)
    agent = load_agent(source, **({"tasks": config.agent["tasks"]} if "tasks" in config.agent else {}))
    if (
        getattr(agent.world_model, "tasks", ())
        or obs_shape == agent.world_model.obs_shape
        or isinstance(obs_shape, Mapping)
    ):
        return agent
    with contextlib.suppress(ValueError):  # of a file that fills nothing up; `_check_fits` says what differs
        return load_agent(source, obs_shape=obs_shape)
    return agent


def _like(config: RunConfig, model: nn.Module, source: str) -> str | None:
    """Return the task whose embedding the run starts from; None for a model without embeddings."""
    like, names = config.start.like, [task.name for task in getattr(model, "tasks", ())]
    if not isinstance(model, SeveralTasks) or not names:
        if like is not None:
            raise ValueError(f"start.like is {like!r}, but {source} holds a model of a single task. Leave it out.")
        return None
    if names == [config.env.id]:  # it was fitted to this task, and knows no longer what it was like
        return config.env.id
    like = like or (names[0] if len(names) == 1 else paper_name(config.env.id))
    if like not in names:
        raise ValueError(
            f"{source} knows {len(names)} {'tasks' if len(names) > 1 else 'task'}, but none is called {like!r}. "
            f"Give --like the one most like {config.env.id}, whose embedding it starts from, one of: "
            f"{', '.join(names)}."
        )
    return like


def _check_fits(config: RunConfig, description: Mapping[str, Any], model: Any, env: Spaces) -> None:
    """Raise ValueError where observations or actions differ from the model's."""
    classes = tuple(description.get("action_classes", ()))
    for what, found, expected in (
        ("reads observations", model.obs_shape, observation_shape(env.observation_space)),
        ("acts with actions of size", model.action_dim, env.action_dim),
        ("chooses among", classes, action_classes(env.action_space)),
    ):
        if found != expected:
            raise ValueError(f"{config.start.checkpoint} {what} {found}, but {config.env.id} has {expected}.")


def take_weights(agent: Agent, start: AgentSnapshot) -> None:
    """Give the agent the weights of `start`. Raises ValueError if they are of another network."""
    try:
        agent.world_model.load_state_dict(start.model)
        if agent.behaviour is not None and start.behaviour is not None:
            agent.behaviour.load_state_dict(start.behaviour)
    except RuntimeError as error:
        raise ValueError(f"the weights of start.checkpoint are of another network: {error}") from error


def with_network_of(config: RunConfig, description: Mapping[str, Any], source: str) -> RunConfig:
    """Return the config with the network of a description in `algorithm` and `agent`, so that it needs no checkpoint.

    Raises ValueError for another family, or for a field of `agent` that says otherwise.
    """
    name, family = str(description["family"]), find_family(str(description["family"]))
    if family is None or resolve(config.algorithm)[0] != name:
        raise ValueError(
            f"algorithm is {config.algorithm!r}, but {source} holds a model of {name}. Give --algorithm {name}."
        )
    saved = description["config"]
    fields = {field: saved[field] for field in getattr(family.config, "network_fields", saved) if field in saved}
    for field, value in config.agent.items():
        if field in fields and value != fields[field]:
            raise ValueError(
                f"agent.{field} is {value!r}, but {fields[field]!r} in {source}, whose network this run has. Leave it "
                "out."
            )
    algorithm = _preset_of(name, family, fields) or config.algorithm
    plain = build_config(algorithm, {})
    own = {field: value for field, value in fields.items() if getattr(plain, field) != value}
    options = {key: description[key] for key in family.options if key not in FROM_SPACES and description.get(key)}
    return dataclasses.replace(config, algorithm=algorithm, agent={**config.agent, **own, **options})


FROM_SPACES = (OBS_CLASSES, ACTION_CLASSES)  # options that follow from the environment


def _preset_of(name: str, family: Family, fields: Mapping[str, Any]) -> str | None:
    """Return the preset of the size that these fields describe, None if they are of a size of one's own."""
    shapes = {size: {name: known[name] for name in known if name in fields} for size, known in family.sizes.items()}
    fitting = [size for size, known in shapes.items() if known and known.items() <= fields.items()]
    return f"{name}:{fitting[0]}" if len(fitting) == 1 else None


def keep_network(before: RunConfig, config: RunConfig) -> RunConfig:
    """Return the config of a resumed run with the network that `before`, the saved one, took from a checkpoint."""
    if before.start.checkpoint is None:
        return config
    family = find_family(resolve(before.algorithm)[0])
    options = {key: value for key, value in before.agent.items() if family and key in family.options}
    saved = dataclasses.asdict(build_config(before.algorithm, own_fields(before)))
    description = {"family": resolve(before.algorithm)[0], "config": saved, **options}
    return with_network_of(config, description, "this run")


def own_fields(config: RunConfig) -> dict[str, Any]:
    """Return the entries of `agent` that are fields of the family's config; the others are options of the family."""
    family = find_family(resolve(config.algorithm)[0])
    return {name: value for name, value in config.agent.items() if family is None or name not in family.options}


def place_start(config: RunConfig, root: Path, start: AgentSnapshot | None) -> RunConfig:
    """Return the config for the parts of the run, which find the weights in the run itself, wherever they are.

    start: written to the run's folder; None for a resumed run, whose newest checkpoint takes its place.
    """
    if config.start.checkpoint is None:
        return config
    place = root
    if start is not None:
        write_agent(root / FOLDER, start)
        place = root / FOLDER / "agent"
    return dataclasses.replace(config, start=dataclasses.replace(config.start, checkpoint=str(place)))
