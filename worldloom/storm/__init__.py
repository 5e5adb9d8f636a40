"""STORM: a stochastic transformer as a world model (Zhang et al., NeurIPS 2023)."""

from worldloom.family import Family
from worldloom.storm.agent import STORMAgent
from worldloom.storm.config import SIZES, STORMConfig
from worldloom.storm.world_model import STORMWorldModel

__all__ = ["FAMILY", "SIZES", "STORMAgent", "STORMConfig", "STORMWorldModel"]

WHAT = "STORM (Zhang et al. 2023): a stochastic transformer with a decoder; it learns to act in imagination"
FAMILY = Family(STORMConfig, SIZES, "18m", STORMWorldModel, STORMAgent, description=WHAT, default_obs="image")
