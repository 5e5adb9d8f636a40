"""DreamerV3: mastering diverse control tasks through world models (Hafner et al., Nature 2025)."""

from worldloom.dreamerv3.agent import DreamerV3Agent
from worldloom.dreamerv3.config import SIZES, DreamerV3Config
from worldloom.dreamerv3.world_model import DreamerV3WorldModel
from worldloom.family import Family

__all__ = ["FAMILY", "SIZES", "DreamerV3Agent", "DreamerV3Config", "DreamerV3WorldModel"]

FAMILY = Family(
    DreamerV3Config,
    SIZES,
    "size12m",
    DreamerV3WorldModel,
    DreamerV3Agent,
    {
        "obs_classes": "by key, the class count of observations that are class indices, which are read one-hot",
        "action_classes": "the number of choices of each one-hot part of an action",
    },
    "DreamerV3 (Hafner et al. 2025): a recurrent state-space model, decoder or not; it learns to act in imagination",
    "image",
)
