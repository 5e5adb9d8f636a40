"""World models for reinforcement learning: one typed API, no cluster needed."""

from worldloom.catalog import (
    Family,
    create_agent,
    create_world_model,
    list_models,
    load_agent,
    register_model,
)
from worldloom.types import Agent, Batch, LatentState, Trajectory, WindowSpec, WorldModel

__version__ = "0.1.0"

__all__ = [
    "Agent",
    "Batch",
    "Family",
    "LatentState",
    "Trajectory",
    "WindowSpec",
    "WorldModel",
    "create_agent",
    "create_world_model",
    "list_models",
    "load_agent",
    "register_model",
]
