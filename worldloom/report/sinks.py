"""Metrics in several places at once: metrics.jsonl (a JSON object a line), TensorBoard events, and where else told."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from worldloom.types import Array

logger = logging.getLogger(__name__)

QUEUE = 100_000  # events that may wait for the disk before adding one blocks
CLOSE_SECONDS = 30.0

Sink = Callable[[Mapping[str, float]], None]


class MetricsLogger:
    """Appends; a run that resumes goes on in the same files. Without tensorboardX no events are written.

    sinks: told of the same metrics, each time.
    """

    def __init__(self, run_dir: Path, sinks: Sequence[Sink] = ()) -> None:
        self._file = (run_dir / "metrics.jsonl").open("a", buffering=1)
        self._sinks = sinks
        self._refused = False
        self._board: Any = None
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(run_dir / "tensorboard"), max_queue=QUEUE)

    def write(
        self, env_steps: int | None, updates: int, wall_seconds: float, metrics: Mapping[str, float], **words: str
    ) -> None:
        """TensorBoard counts environment steps, or updates where there is no environment (None). words: go to
        metrics.jsonl alone."""
        counts = {"updates": updates} if env_steps is None else {"env_steps": env_steps, "updates": updates}
        self._append(json.dumps({**counts, "wall_seconds": round(wall_seconds, 3), **metrics, **words}) + "\n")
        for sink in self._sinks:
            sink(metrics)
        for name, value in metrics.items():
            if self._board_lives():
                self._board.add_scalar(name, value, updates if env_steps is None else env_steps)

    def _append(self, line: str) -> None:
        """A disk that is full costs lines, not the run; the first is told of."""
        try:
            self._file.write(line)
        except OSError as error:
            if not self._refused:
                logger.warning("metrics.jsonl cannot be written (%s): lines are missing from here on.", error)
            self._refused = True

    def _board_lives(self) -> bool:
        """A disk that is full ends tensorboardX's writing thread, whose queue then blocks whoever adds to it."""
        if self._board is not None and not self._board.file_writer.event_writer._worker.is_alive():
            logger.warning("TensorBoard's events cannot be written: there are none from here on.")
            self._board = None
        return self._board is not None

    def picture(self, env_steps: int, name: str, image: Array) -> None:
        """image: [H, W, 3] uint8, for TensorBoard."""
        if self._board_lives():
            self._board.add_image(name, image, env_steps, dataformats="HWC")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written is told of
            self._file.close()
        if self._board_lives():  # it may die of a full disk even now, and would then be waited for without end
            closing = threading.Thread(target=self._board.close, daemon=True)
            closing.start()
            closing.join(CLOSE_SECONDS)
