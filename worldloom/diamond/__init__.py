"""DIAMOND: diffusion for world modeling, where visual details matter in Atari (Alonso et al., NeurIPS 2024)."""

from worldloom.diamond.agent import DiamondAgent
from worldloom.diamond.config import SIZES, DiamondConfig
from worldloom.diamond.world_model import DiamondWorldModel

__all__ = ["SIZES", "DiamondAgent", "DiamondConfig", "DiamondWorldModel"]
