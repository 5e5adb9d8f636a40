"""Metrics in two places at once: metrics.jsonl, a JSON object a line, and TensorBoard events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worldloom.types import Array


class MetricsLogger:
    """Appends to both; a run that resumes goes on in the same files. Without tensorboardX only the first is written."""

    def __init__(self, run_dir: Path) -> None:
        self._file = (run_dir / "metrics.jsonl").open("a", buffering=1)
        self._board: Any = None
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(run_dir / "tensorboard"))

    def write(self, env_steps: int, updates: int, wall_seconds: float, metrics: Mapping[str, float]) -> None:
        line = {"env_steps": env_steps, "updates": updates, "wall_seconds": round(wall_seconds, 3), **metrics}
        self._file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, env_steps)

    def picture(self, env_steps: int, name: str, image: Array) -> None:
        """image: [H, W, 3] uint8, for TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, image, env_steps, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
