"""DIAMOND: diffusion for world modeling, where visual details matter in Atari (Alonso et al., NeurIPS 2024)."""

from worldloom.diamond.agent import DiamondAgent
from worldloom.diamond.config import SIZES, DiamondConfig
from worldloom.diamond.world_model import DiamondWorldModel
from worldloom.family import Family

__all__ = ["FAMILY", "SIZES", "DiamondAgent", "DiamondConfig", "DiamondWorldModel"]

WHAT = "DIAMOND (Alonso et al. 2024): a diffusion model draws frames; for one square image and one choice of actions"
FAMILY = Family(DiamondConfig, SIZES, "atari", DiamondWorldModel, DiamondAgent, description=WHAT, default_obs="image")
