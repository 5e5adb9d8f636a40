"""Metrics in several places at once: metrics.jsonl (one JSON object per line), TensorBoard events, further sinks."""

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

Sink = Callable[[Mapping[str, float | str]], None]  # takes a line of metrics.jsonl


class MetricsLogger:
    """Appends metrics to files; a resumed run goes on in the same files. Without tensorboardX no events are written.

    sinks: functions that are called with each line of metrics.jsonl.
    """

    def __init__(self, run_dir: Path, sinks: Sequence[Sink] = ()) -> None:
        self._dir, self._sinks = run_dir, sinks
        self._refused = False
        self._open()

    def _open(self) -> None:
        self._dir.mkdir(parents=True, exist_ok=True)
        self._file = (self._dir / "metrics.jsonl").open("a", buffering=1)
        self._board: Any = None
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(self._dir / "tensorboard"), max_queue=QUEUE)

    def write(
        self, env_steps: int | None, updates: int, wall_seconds: float, metrics: Mapping[str, float], **words: str
    ) -> None:
        """Write metrics. TensorBoard counts environment steps, or updates if there is no environment (env_steps None).
        words: texts for metrics.jsonl and the sinks."""
        counts = {"updates": updates} if env_steps is None else {"env_steps": env_steps, "updates": updates}
        line: dict[str, float | str] = {**counts, "wall_seconds": round(wall_seconds, 3), **metrics, **words}
        self._append(json.dumps(line) + "\n")
        for sink in self._sinks:
            sink(line)
        for name, value in metrics.items():
            if self._board_is_alive():
                self._board.add_scalar(name, value, updates if env_steps is None else env_steps)

    def _append(self, line: str) -> None:
        """Append a line. If the disk is full, lines are lost but the run goes on; the first loss is logged."""
        try:
            if not (self._dir / "metrics.jsonl").exists():  # the directory was deleted
                self.close()
                self._open()
            self._file.write(line)
        except OSError as error:
            if not self._refused:
                logger.warning("metrics.jsonl cannot be written (%s): lines are missing from now on.", error)
            self._refused = True

    def _board_is_alive(self) -> bool:
        """Return True while TensorBoard events can be written.

        A full disk ends tensorboardX's writing thread, whose queue then blocks every caller that adds to it."""
        if self._board is not None and not self._board.file_writer.event_writer._worker.is_alive():
            logger.warning("TensorBoard events cannot be written: they are missing from now on.")
            self._board = None
        return self._board is not None

    def picture(self, env_steps: int, name: str, image: Array) -> None:
        """Write an image [H, W, 3] uint8 to TensorBoard."""
        if self._board_is_alive():
            self._board.add_image(name, image, env_steps, dataformats="HWC")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the loss is logged already
            self._file.close()
        if self._board_is_alive():  # a full disk may still end its thread, and close would then wait without end
            closing = threading.Thread(target=self._board.close, daemon=True)
            closing.start()
            closing.join(CLOSE_SECONDS)
