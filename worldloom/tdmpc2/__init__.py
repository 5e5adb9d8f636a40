"""TD-MPC2: scalable, robust world models for continuous control (Hansen, Su & Wang, ICLR 2024)."""

from worldloom.tdmpc2.agent import TDMPC2Agent
from worldloom.tdmpc2.config import SIZES, TDMPC2Config
from worldloom.tdmpc2.world_model import TDMPC2WorldModel

__all__ = ["SIZES", "TDMPC2Agent", "TDMPC2Config", "TDMPC2WorldModel"]
