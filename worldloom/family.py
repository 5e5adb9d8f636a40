"""Families of models, and the search for one outside the library: by module name or by entry point."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, get_args, get_origin, get_type_hints

from worldloom.nearest import nearest

GROUP = "worldloom.families"  # entry points: short name = "my_package.my_family", or "my_package.my_family:FAMILY"


def as_given(size: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ARG001
    """Return no config fields, and the options unchanged: for families whose options set no config field."""
    return {}, dict(options)


@dataclass(frozen=True)
class Family:
    """The parts of one algorithm. A module of yours holds one as `FAMILY`; the module's name is the family's name."""

    config: type[Any]  # a frozen dataclass; its fields are what `agent: {…}` may override
    sizes: Mapping[str, Mapping[str, Any]]  # preset size -> config fields
    default_size: str
    model: Callable[..., Any]  # (obs_shape, action_dim, config, episode_length, **options) -> WorldModel
    agent: Callable[..., Any]  # (model, seed, action_classes) -> Agent
    options: Mapping[str, str] = field(default_factory=dict)  # further arguments of `model`: name -> meaning
    description: str = ""  # one sentence, which also names what the family does not take
    default_obs: str = "vector"  # what the published settings observe: vector or image
    # (size, options as create_world_model or a description has them) -> (config fields that follow, options of `model`)
    read_options: Callable[[str, Mapping[str, Any]], tuple[dict[str, Any], dict[str, Any]]] = as_given
    # (path, obs_shape, action_dim, device, episode_length, overrides=, **options) -> WorldModel: reads a file
    # of its authors. Raises ValueError for a file of another kind
    load_file: Callable[..., Any] | None = None


def installed() -> dict[str, EntryPoint]:
    """Return the entry points of installed packages, by short name."""
    return {point.name: point for point in entry_points(group=GROUP)}


def import_family(name: str) -> Family | None:
    """Return the family behind an entry point or in a module, None if there is neither.

    Raises ValueError for a module that cannot be imported or holds no FAMILY, TypeError if FAMILY is something else.
    """
    point = installed().get(name)
    module, _, attribute = (point.value if point else name).partition(":")
    if not all(part.isidentifier() for part in module.split(".")):
        return None
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if point is None and error.name and f"{module}.".startswith(f"{error.name}."):
            return None  # the module itself, or a package that it would be in
        raise ValueError(f"family {name!r} cannot be imported: {error}. Install that module.") from error
    except ImportError as error:
        raise ValueError(f"family {name!r} cannot be imported: {error}.") from error
    family = getattr(found, attribute or "FAMILY", None)
    if family is None:
        raise ValueError(
            f"family {name!r}: module {module} holds no {attribute or 'FAMILY'}, expected FAMILY = worldloom.Family(…)."
        )
    if not isinstance(family, Family):
        raise TypeError(
            f"family {name!r}: {attribute or 'FAMILY'} in {module} is a {type(family).__name__}, expected a "
            "worldloom.Family."
        )
    return family


def check_overrides(config: type[Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return checked overrides: fields of `config`, with values of their types (whole numbers become floats).

    Raises ValueError for an unknown field or choice, TypeError for a value of another type.
    """
    hints = get_type_hints(config)
    checked = {}
    for name, value in overrides.items():
        if name not in hints:
            near = nearest(name, hints)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(hints)}."
            raise ValueError(f"agent.{name} is not a field of {config.__name__}. {hint}")
        if get_origin(hints[name]) is Literal:
            if value not in get_args(hints[name]):
                expected = " or ".join(map(repr, get_args(hints[name])))
                raise ValueError(f"agent.{name} is {value!r}, expected {expected}.")
            checked[name] = value
            continue
        allowed = get_args(hints[name]) or (hints[name],)
        if float in allowed and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) not in allowed:
            expected = " or ".join(getattr(t, "__name__", str(t)) for t in allowed)
            raise TypeError(f"agent.{name} is {value!r} ({type(value).__name__}), expected {expected}.")
        checked[name] = value
    return checked
