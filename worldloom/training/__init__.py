"""Training from recorded data, and what the in-process trainer and the Ray actors share; needs no cluster."""

from worldloom.training.callbacks import (
    Callback,
    CallbackError,
    CheckpointCallback,
    EarlyStoppingCallback,
    LoggingCallback,
    ProgressCallback,
)
from worldloom.training.checkpoint import CheckpointError
from worldloom.training.episodes import read_episodes
from worldloom.training.replay import ReplayBuffer
from worldloom.training.trainer import Trainer, train
from worldloom.training.training_config import TrainingConfig

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
    "train",
]
