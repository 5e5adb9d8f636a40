"""Training from recorded data, without a cluster."""

from worldloom.files import CheckpointError
from worldloom.replay.buffer import ReplayBuffer
from worldloom.replay.lerobot import read_lerobot
from worldloom.replay.minari import read_minari
from worldloom.replay.recorded import read_episodes
from worldloom.training.callbacks import CheckpointCallback, EarlyStoppingCallback, LoggingCallback
from worldloom.training.config import TrainingConfig
from worldloom.training.trainer import Callback, CallbackError, ProgressCallback, Trainer, train

__all__ = [
    "Callback",
    "CallbackError",
    "CheckpointCallback",
    "CheckpointError",
    "EarlyStoppingCallback",
    "LoggingCallback",
    "ProgressCallback",
    "ReplayBuffer",
    "Trainer",
    "TrainingConfig",
    "read_episodes",
    "read_lerobot",
    "read_minari",
    "train",
]
