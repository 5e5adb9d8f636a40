"""The files that TD-MPC2's authors published: checkpoints, and episodes for offline learning."""

from worldloom.tdmpc2.official.checkpoints import load_official, save_official
from worldloom.tdmpc2.official.episodes import read_official_episodes

__all__ = ["load_official", "read_official_episodes", "save_official"]
