"""TD-MPC2: scalable, robust world models for continuous control (Hansen, Su & Wang, ICLR 2024)."""

from worldloom.tdmpc2.agent import TDMPC2Agent
from worldloom.tdmpc2.config import SIZES, TDMPC2Config
from worldloom.tdmpc2.official import load_official, read_official_episodes, save_official
from worldloom.tdmpc2.tasks import TASK_SETS, Task
from worldloom.tdmpc2.world_model import TDMPC2WorldModel

__all__ = [
    "SIZES",
    "TASK_SETS",
    "TDMPC2Agent",
    "TDMPC2Config",
    "TDMPC2WorldModel",
    "Task",
    "load_official",
    "read_official_episodes",
    "save_official",
]
