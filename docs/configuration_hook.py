"""Fills the configuration reference from the dataclasses, when the pages are built."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.sweeps.search import SearchConfig
from worldloom.diamond import DiamondConfig
from worldloom.dreamerv3 import DreamerV3Config
from worldloom.envs.suites import AtariConfig, DMCConfig
from worldloom.meanings import meanings
from worldloom.runs.config import (
    CheckpointConfig,
    EnvConfig,
    EvalConfig,
    LogConfig,
    ReplayConfig,
    RunConfig,
    RuntimeConfig,
    StartConfig,
    TrainConfig,
)
from worldloom.storm import STORMConfig
from worldloom.tdmpc2 import TDMPC2Config
from worldloom.training import TrainingConfig

SECTIONS: dict[str, tuple[str, type[Any]]] = {
    "run": ("", RunConfig),
    "start": ("start.", StartConfig),
    "env": ("env.", EnvConfig),
    "env.atari": ("env.atari.", AtariConfig),
    "env.dmc": ("env.dmc.", DMCConfig),
    "replay": ("replay.", ReplayConfig),
    "train": ("train.", TrainConfig),
    "runtime": ("runtime.", RuntimeConfig),
    "eval": ("eval.", EvalConfig),
    "checkpoint": ("checkpoint.", CheckpointConfig),
    "log": ("log.", LogConfig),
    "search": ("search.", SearchConfig),
    "TrainingConfig": ("", TrainingConfig),
    "TDMPC2Config": ("agent.", TDMPC2Config),
    "DreamerV3Config": ("agent.", DreamerV3Config),
    "STORMConfig": ("agent.", STORMConfig),
    "DiamondConfig": ("agent.", DiamondConfig),
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for each page: `<!-- fields: NAME -->` becomes the table of that section."""
    return re.sub(r"<!-- fields: ([\w.]+) -->", lambda match: table(match[1]), markdown)


def table(name: str) -> str:
    """A row for each field: name, type, default and what it means."""
    prefix, config = SECTIONS[name]
    types, said = get_type_hints(config), meanings(config)
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(types[field.name]):
            continue  # it has a table of its own
        shown = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
        default = json.dumps(shown) if shown is None or isinstance(shown, (bool, dict, list)) else shown
        meaning = said.get(field.name, "").replace("|", "\\|")
        rows.append(f"| `{prefix}{field.name}` | {kind(types[field.name])} | `{default}` | {meaning} |")
    return "\n".join(rows)


def kind(hint: Any) -> str:
    """A type as a reader of YAML knows it."""
    if get_origin(hint) is dict:
        return "mapping"
    if get_origin(hint) is list:
        return f"list of {kind(get_args(hint)[0])}"
    parts = get_args(hint)
    if parts and all(isinstance(part, str) for part in parts):
        return " or ".join(f"`{part}`" for part in parts)
    names = [getattr(part, "__name__", str(part)) for part in (parts or (hint,))]
    return " or ".join("null" if name == "NoneType" else name for name in names)
