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
    from worldloom.sharing.card import ModelCard
    from worldloom.sharing.directory import save_agent
    from worldloom.sharing.hub import from_hub, push_to_hub
    from worldloom.types import Agent, Batch, LatentState, Trajectory, WindowSpec, WorldModel

__version__ = "0.1.0"

__all__ = [
    "Agent",
    "Batch",
    "Family",
    "LatentState",
    "ModelCard",
    "ModelInfo",
    "Trajectory",
    "WindowSpec",
    "WorldModel",
    "create_agent",
    "create_world_model",
    "export",
    "from_hub",
    "get_config",
    "get_model_info",
    "list_models",
    "load_agent",
    "push_to_hub",
    "register_model",
    "save_agent",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used: the console command must answer before torch is imported."""
        if name not in __all__:
            raise AttributeError(f"module 'worldloom' has no attribute {name!r}")
        homes = {
            "Family": "family",
            "export": "program",
            "ModelCard": "sharing.card",
            "save_agent": "sharing.directory",
        }
        homes |= dict.fromkeys(("Agent", "Batch", "LatentState", "Trajectory", "WindowSpec", "WorldModel"), "types")
        homes |= dict.fromkeys(("from_hub", "push_to_hub"), "sharing.hub")
        value = globals()[name] = getattr(importlib.import_module(f"worldloom.{homes.get(name, 'families')}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
