"""World models for reinforcement learning: one typed API, no cluster needed."""

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
    "get_config",
    "get_model_info",
    "list_models",
    "load_agent",
    "register_model",
]
