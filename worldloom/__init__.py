"""World models for reinforcement learning: one typed API, no cluster needed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worldloom.families import (
        ModelInfo,
        create_agent,
        create_world_model,
        get_config,
        get_model_info,
        list_models,
        load_agent,
        register_model,
    )
    from worldloom.family import Family
    from worldloom.program import export
    from worldloom.types import Agent, Batch, LatentState, Trajectory, WindowSpec, WorldModel

__version__ = "0.1.0"

__all__ = [
    "Agent",
    "Batch",
    "Family",
    "LatentState",
    "ModelInfo",
    "Trajectory",
    "WindowSpec",
    "WorldModel",
    "create_agent",
    "create_world_model",
    "export",
    "get_config",
    "get_model_info",
    "list_models",
    "load_agent",
    "register_model",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used: the console command must answer before torch is imported."""
        if name not in __all__:
            raise AttributeError(f"module 'worldloom' has no attribute {name!r}")
        types = ("Agent", "Batch", "LatentState", "Trajectory", "WindowSpec", "WorldModel")
        homes = {**dict.fromkeys(types, "types"), "Family": "family", "export": "program"}
        value = globals()[name] = getattr(importlib.import_module(f"worldloom.{homes.get(name, 'families')}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
