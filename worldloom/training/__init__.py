"""Training from recorded data, and what the in-process trainer and the Ray actors share; needs no cluster."""

from worldloom.replay.buffer import ReplayBuffer
from worldloom.replay.recorded import read_episodes
from worldloom.runs.checkpoint import CheckpointError
from worldloom.training.callbacks import (
    Callback,
    CallbackError,
    CheckpointCallback,
    EarlyStoppingCallback,
    LoggingCallback,
    ProgressCallback,
)
from worldloom.training.config import TrainingConfig
from worldloom.training.trainer import Trainer, train

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
