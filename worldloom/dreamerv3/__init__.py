"""DreamerV3: mastering diverse control tasks through world models (Hafner et al., Nature 2025)."""

from worldloom.dreamerv3.agent import DreamerV3Agent
from worldloom.dreamerv3.config import SIZES, DreamerV3Config
from worldloom.dreamerv3.world_model import DreamerV3WorldModel

__all__ = ["SIZES", "DreamerV3Agent", "DreamerV3Config", "DreamerV3WorldModel"]
