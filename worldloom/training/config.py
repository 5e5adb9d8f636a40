"""The settings of training from recorded data."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from worldloom.nearest import nearest


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of training from recorded data. Intervals and steps count gradient updates.

    Args:
        total_steps: updates
        batch_size: B, sequences per update
        sequence_length: T, rows per sequence
        learning_rate: learning rate of AdamW
        grad_clip: largest global norm of the gradient
        weight_decay: decoupled weight decay of AdamW
        warmup_steps: updates in which the learning rate rises linearly from zero
        log_interval: updates between two logs, whose metrics are means over them
        eval_interval: updates between two evaluations on validation data; 0 evaluates at the end only
        eval_batches: batches that an evaluation averages over
        save_interval: updates between two checkpoints of a CheckpointCallback; 0 saves at the end only
        device: auto, cpu, cuda or cuda:N; auto takes a GPU if there is one
        seed: seed of the drawn sequences and of the model's noise
    """

    total_steps: int = 50_000
    batch_size: int = 16
    sequence_length: int = 50
    learning_rate: float = 3e-4
    grad_clip: float = 100.0
    weight_decay: float = 0.0
    warmup_steps: int = 0
    log_interval: int = 100
    eval_interval: int = 1_000
    eval_batches: int = 16
    save_interval: int = 0
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            fits = isinstance(value, str) if kind is str else isinstance(value, int if kind is int else (int, float))
            if not fits or isinstance(value, bool):
                raise TypeError(f"TrainingConfig.{field.name} is {value!r}, expected {kind.__name__}.")
        least = {"total_steps": 1, "batch_size": 1, "sequence_length": 2, "log_interval": 1, "eval_batches": 1}
        for name in (
            *least, "learning_rate", "grad_clip", "weight_decay", "warmup_steps", "eval_interval", "save_interval",
            "seed",
        ):  # fmt: skip
            value, bound = getattr(self, name), least.get(name, 0)
            above = name in ("learning_rate", "grad_clip")
            if not math.isfinite(value) or value < bound or (above and value == 0):
                expected = "above 0" if above else f"at least {bound}"
                raise ValueError(f"TrainingConfig.{name} is {value!r}, expected {expected}.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the settings as JSON."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrainingConfig:
        """Read JSON. Raises ValueError or TypeError, naming the field, and FileNotFoundError if there is no file."""
        try:
            found = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON ({error}).") from error
        names = [field.name for field in dataclasses.fields(cls)]
        for name in found if isinstance(found, dict) else [f"a {type(found).__name__}"]:
            if name not in names:
                near = nearest(name, names)
                hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(names)}."
                raise ValueError(f"{path} holds {name!r}, which is no field of TrainingConfig. {hint}")
        return cls(**found)
