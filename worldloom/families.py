"""Models by name: every preset in plain sight, and the way from a name, alias or directory to a model or an agent."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast, overload

import torch

from worldloom import diamond, dreamerv3, storm, tdmpc2
from worldloom.arguments import channel_first, usable
from worldloom.family import Family, check_overrides, import_family, installed
from worldloom.locations import Location, is_file, locate, on_disk
from worldloom.manifest import newest_checkpoint
from worldloom.nearest import nearest
from worldloom.pretrained import load_parameters, read_description
from worldloom.tdmpc2 import TDMPC2Agent, TDMPC2Config, TDMPC2WorldModel, load_official
from worldloom.tdmpc2.tasks import read_options
from worldloom.types import Agent, WorldModel

if TYPE_CHECKING:
    import gymnasium


OBS_CLASSES, ACTION_CLASSES = "obs_classes", "action_classes"  # options that follow from the spaces of an environment

FAMILIES: dict[str, Family] = {
    "dreamerv3": dreamerv3.FAMILY,
    "tdmpc2": Family(
        TDMPC2Config,
        tdmpc2.SIZES,
        "5m",
        TDMPC2WorldModel,
        TDMPC2Agent,
        {
            ACTION_CLASSES: "the number of choices of each one-hot part of an action",
            "tasks": "the tasks of a multi-task model: mt30, mt80, or a list of Task(name, action_dim)",
        },
        "TD-MPC2 (Hansen et al. 2024): an implicit, decoder-free world model; acts by planning in latent space",
        read_options=read_options,
        load_file=load_official,
    ),
    "diamond": diamond.FAMILY,
    "storm": storm.FAMILY,
}
ALIASES: dict[str, str] = {
    **dict.fromkeys(("dreamer", "dreamer-small"), "dreamerv3:size12m"),
    "dreamer-medium": "dreamerv3:size50m",
    "dreamer-large": "dreamerv3:size200m",
    **dict.fromkeys(("tdmpc", "tdmpc-small"), "tdmpc2:5m"),
    "tdmpc-medium": "tdmpc2:48m",
    "tdmpc-large": "tdmpc2:317m",
}


def register_model(name: str, family: Family) -> None:
    """Make `name:size` known to this process alone; `module:size` needs no call and works in every process of a run.

    Raises ValueError if the name is taken.
    """
    if name in FAMILIES:
        raise ValueError(f"register_model: {name!r} is taken. Choose another name.")
    FAMILIES[name] = family


def find_family(name: str) -> Family | None:
    """Return the family of that name: ours, registered, installed, or FAMILY of the module of that name; else None.

    Raises ValueError or TypeError for a module that holds no Family.
    """
    return FAMILIES.get(name) or import_family(name)


class ModelInfo(TypedDict):
    """Facts about a preset that need no model."""

    description: str
    family: str
    parameters: str | None  # the published count, such as "12M", if any; yours depends on observations and actions
    default_obs: str  # vector or image


@overload
def list_models(verbose: Literal[False] = False) -> list[str]: ...
@overload
def list_models(verbose: Literal[True]) -> dict[str, ModelInfo]: ...
def list_models(verbose: bool = False) -> list[str] | dict[str, ModelInfo]:
    """Return every preset, ours and installed, as create_world_model takes it; verbose adds its `get_model_info`."""
    names = dict.fromkeys([*FAMILIES, *installed()])
    found = {name: family for name in names if (family := find_family(name))}
    presets = [f"{name}:{size}" for name, family in found.items() for size in family.sizes]
    return {preset: get_model_info(preset) for preset in presets} if verbose else presets


def get_model_info(model: str) -> ModelInfo:
    """Return the description, family, size and observation kind of a preset or alias. Raises ValueError for others."""
    family, name, size = _preset(model)
    return {
        "description": family.description,
        "family": name,
        "parameters": count[1].upper() if (count := re.fullmatch(r"(?:size)?(\d+m)", size)) else None,
        "default_obs": family.default_obs,
    }


def get_config(model: str, **overrides: Any) -> Any:
    """Return the configuration of a preset or alias with some fields replaced: the family's own frozen dataclass.

    Raises ValueError for an unknown model or field, TypeError for a value of another type.
    """
    return build_config(model, overrides)


def resolve(model: str) -> tuple[str, str]:
    """Return (family, size) of a preset or alias. Raises ValueError with near names, TypeError as `find_family`."""
    return _preset(model)[1:]


def _preset(model: str) -> tuple[Family, str, str]:
    name, _, size = ALIASES.get(model, model).partition(":")
    family = find_family(name)
    if family is not None and (size or family.default_size) in family.sizes:
        return family, name, size or family.default_size
    known = [f"{known}:{size}" for known, ours in FAMILIES.items() for size in ours.sizes]
    known += [*FAMILIES, *installed(), *ALIASES]
    if family is not None:
        known = [f"{name}:{size}" for size in family.sizes]
    near = [] if "." in name and not family else nearest(model, known, 3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    others = "" if family else ", the path of a model, or module:size of a module that can be imported and holds FAMILY"
    raise ValueError(f"unknown model {model!r}.{hint} Known: {', '.join(known)}{others}.")


def build_config(model: str, overrides: Mapping[str, Any]) -> Any:
    """Return a preset's configuration, some fields replaced. Raises ValueError or TypeError that names the field."""
    family, _, size = _preset(model)
    fields = {**family.sizes[size], **check_overrides(family.config, overrides)}
    return family.config(**fields)


def create_world_model(
    model: Location,
    obs_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None,
    action_dim: int | None = None,
    device: torch.device | str = "cpu",
    episode_length: int | None = None,
    **settings: Any,
) -> WorldModel:
    """Make a world model from a preset ("tdmpc2:5m", or "my_package.my_family:size" of your own), an alias ("tdmpc"),
    a directory (`save_pretrained`) or a file that a family's authors published.

    obs_shape: shape of one observation, channel-first for images; some families also take a mapping of shapes.
    action_dim: A, the number of action dimensions or of one-hot entries. episode_length: agent steps, if known.
    settings: fields of the model's config, and options of its family (`Family.options`): obs_classes and
    action_classes of DreamerV3, tasks and action_classes of TD-MPC2. Raises ValueError or TypeError that names what was
    wrong, FileNotFoundError for a directory without a model.
    """
    if Path(model).is_dir():
        return _load_world_model(model, obs_shape, action_dim, device, settings)
    if Path(model).is_file():
        return _load_file(model, obs_shape, action_dim, device, episode_length, settings)[1]
    family, _, size = _preset(str(model))
    if obs_shape is None or action_dim is None:
        raise ValueError(
            f"create_world_model({model!r}) needs obs_shape and action_dim, as in obs_shape=(39,), action_dim=4."
        )
    options, overrides = _split(str(model), family, settings)
    fields, options = family.read_options(size, options)
    config, shape = build_config(str(model), {**fields, **overrides}), channel_first(obs_shape)
    return cast(WorldModel, family.model(shape, action_dim, config, episode_length, **options).to(usable(device)))


def _split(model: str, family: Family, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the given options of the family, and the rest, which must be fields of its config.

    Raises ValueError for an option of another family.
    """
    options = {name: value for name, value in settings.items() if name in family.options and value}
    rest = {name: value for name, value in settings.items() if name not in family.options}
    fields = {field.name for field in dataclasses.fields(family.config)}
    for name in rest.keys() - fields:
        if others := [other for other, known in FAMILIES.items() if name in known.options]:
            takes = f"It takes {', '.join(family.options)}." if family.options else "It takes no options."
            raise ValueError(f"{model} takes no {name}, which is an option of {', '.join(others)}. {takes}")
    return options, rest


def _load_file(
    path: Location,
    obs_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None,
    action_dim: int | None,
    device: torch.device | str,
    episode_length: int | None,
    settings: Mapping[str, Any],
) -> tuple[Family, WorldModel]:
    """Return the family that can read a file of its authors, and the model. Raises ValueError if none can."""
    refused: list[ValueError] = []
    for name, family in FAMILIES.items():
        if family.load_file is None:
            continue
        options, overrides = _split(name, family, settings)
        _, options = family.read_options("", options)  # the file determines the fields that they set
        fields = check_overrides(family.config, overrides)
        try:
            return family, family.load_file(
                path, obs_shape, action_dim, usable(device), episode_length, overrides=fields, **options
            )
        except ValueError as error:
            refused.append(error)
    raise ValueError(" ".join(map(str, refused)) or f"{path}: no family reads files.")


def _load_world_model(
    directory: Location,
    obs_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None,
    action_dim: int | None,
    device: torch.device | str,
    overrides: Mapping[str, Any],
) -> WorldModel:
    description = read_description(directory)
    if (family := find_family(str(description.get("family")))) and (foreign := overrides.keys() & family.options):
        raise ValueError(f"{directory} knows its own {', '.join(sorted(foreign))}. Leave them out.")
    model = _from_description(directory, description, overrides)
    for name, wanted, found in [
        ("obs_shape", tuple(obs_shape) if isinstance(obs_shape, list) else obs_shape, model.obs_shape),
        ("action_dim", action_dim, model.action_dim),
    ]:
        if wanted is not None and wanted != found:
            raise ValueError(f"{directory} holds a model with {name}={found}, but {name}={wanted} was asked for.")
    load_parameters(Path(directory) / "model.safetensors", model)
    return cast(WorldModel, model.to(usable(device)))


def _from_description(source: object, description: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    family = find_family(name := str(description.get("family")))
    if family is None:
        raise ValueError(f"{source} is of family {name!r}, expected {', '.join(FAMILIES)}, or a module on sys.path.")
    config = family.config(**{**description["config"], **check_overrides(family.config, overrides)})
    shape = description["obs_shape"]
    obs_shape = {k: tuple(v) for k, v in shape.items()} if isinstance(shape, Mapping) else tuple(shape)
    options: dict[str, Any] = {key: description[key] for key in family.options if description.get(key)}
    _, options = family.read_options("", options)  # the config already holds the fields that they set
    return family.model(obs_shape, description["action_dim"], config, description["episode_length"], **options)


def create_agent(
    model: str,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    *,
    episode_length: int | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    **overrides: Any,
) -> Agent:
    """Make an agent for the spaces of `make_env` (see `worldloom.spaces`).

    Raises ValueError or TypeError for spaces or fields that the model cannot take.
    """
    from worldloom.spaces import ActionCodec, ObservationCodec, observation_classes, observation_shape

    family, name, _ = _preset(model)
    actions, observations = ActionCodec(model, action_space), ObservationCodec(model, observation_space).space
    with torch.random.fork_rng(devices=[]):  # one seed gives one agent, and leaves torch's own generator alone
        torch.manual_seed(seed)
        options: dict[str, Any] = {}
        if classes := observation_classes(observations):
            if OBS_CLASSES not in family.options:
                raise ValueError(
                    f"{model} reads numbers, but {', '.join(classes)} are class indices. Make them one-hot."
                )
            options[OBS_CLASSES] = classes
        if ACTION_CLASSES in family.options:
            options[ACTION_CLASSES] = actions.classes
        shape = observation_shape(observations)
        world_model = create_world_model(model, shape, actions.size, device, episode_length, **options, **overrides)
        agent = cast(Agent, family.agent(world_model, seed, actions.classes))
    found = find_family(named := str(agent.describe().get("family")))
    if found is None or (found.model, found.agent) != (family.model, family.agent):
        raise ValueError(f"{model} describes its family as {named!r}, expected {name!r}, the name that finds it.")
    return agent


def agent_from_description(
    description: Mapping[str, Any],
    device: torch.device | str = "cpu",
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
) -> Agent:
    """Make an untrained agent from what `Agent.describe` returned; `load_state_dict` or weights complete it."""
    model = _from_description("the description", description, overrides or {}).to(usable(device))
    family = cast(Family, find_family(description["family"]))
    return cast(Agent, family.agent(model, seed, tuple(description.get("action_classes", ()))))


def load_agent(
    directory: Location,
    device: torch.device | str = "cpu",
    seed: int = 0,
    episode_length: int | None = None,
    obs_shape: tuple[int, ...] | None = None,
    **settings: Any,
) -> Agent:
    """Load a trained agent from a run (its newest checkpoint; a folder, or a URL such as s3://bucket/runs/NAME), a
    model directory, or a file that a family's authors published (see `create_world_model` for its options).
    settings: configuration fields that shape no parameter, such as num_samples=256 for half of TD-MPC2's planning.
    obs_shape: for a file alone: how many numbers are observed, where Newt's model of one task fills them up with zeros.

        agent = load_agent("runs/pendulum")
        obs, act_state, is_first = env.reset(), None, np.ones(env.num_envs, bool)
        while True:
            actions, act_state = agent.act(obs, act_state, is_first, explore=False)
            step = env.step(actions)
            obs, is_first = step.obs, step.is_first

    Raises FileNotFoundError if there is no checkpoint, ValueError for settings that the parameters do not fit.
    """
    folder = locate(directory)
    if is_file(folder):
        with on_disk(folder) as path:
            family, model = _load_file(path, obs_shape, None, device, episode_length, settings)
        return cast(Agent, family.agent(model, seed, ()))
    for name, given in (("obs_shape", obs_shape), ("episode_length", episode_length)):
        if given is not None:
            raise ValueError(
                f"load_agent: {name} is for a file that authors published; {directory} says its own. Leave it out."
            )
    if (folder / "checkpoints").is_dir():
        folder = newest_checkpoint(folder) / "agent"
    elif not is_file(folder / "config.json"):
        raise FileNotFoundError(
            f"{directory} holds neither checkpoints nor a config.json, expected the directory of a run or of a model."
        )
    with on_disk(folder) as local:
        agent = agent_from_description(read_description(local), device, seed, settings)
        load_parameters(local / "model.safetensors", agent.world_model)
        if agent.behaviour is not None:
            load_parameters(local / "behaviour.safetensors", agent.behaviour)
    return agent


def config_fields(model: str) -> list[dataclasses.Field[Any]]:
    """Return the fields that `agent: {…}` may override for this model, in order."""
    return list(dataclasses.fields(_preset(model)[0].config))
