"""STORM: a stochastic transformer as a world model (Zhang et al., NeurIPS 2023)."""

from worldloom.storm.agent import STORMAgent
from worldloom.storm.config import SIZES, STORMConfig
from worldloom.storm.world_model import STORMWorldModel

__all__ = ["SIZES", "STORMAgent", "STORMConfig", "STORMWorldModel"]
