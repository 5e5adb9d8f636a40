"""Metrics in several places at once: metrics.jsonl (one JSON object a line), the boards of `log.to`, further sinks."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from worldloom.report.boards import Board, open_boards, renew_files
from worldloom.report.lines import RESUMED_AT
from worldloom.types import Array

logger = logging.getLogger(__name__)

Sink = Callable[[Mapping[str, float | str]], None]  # takes a line of metrics.jsonl


class MetricsLogger:
    """Appends metrics to files; a resumed run goes on in the same files.

    sinks: functions that are called with each line of metrics.jsonl. resumed_at: steps of the checkpoint from which the
    run is resumed; the first line holds them, so that readers know which earlier lines no longer count.
    """

    def __init__(self, run_dir: Path, sinks: Sequence[Sink] = (), resumed_at: int | None = None) -> None:
        self._dir, self._sinks = run_dir, sinks
        self._marks = {} if resumed_at is None else {RESUMED_AT: resumed_at}
        self._refused = False
        self._boards: list[Board] | None = None
        self._open()

    def _open(self) -> None:
        self._dir.mkdir(parents=True, exist_ok=True)
        path = self._dir / "metrics.jsonl"
        cut = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", buffering=1)
        if cut:  # by a kill: the next line is not a part of that one
            self._file.write("\n")

    def open_boards(self) -> None:
        """Open the boards, if they are not open yet. By now the run has written its config.yaml, which names them."""
        if self._boards is None:
            self._boards = open_boards(self._dir)

    def write(
        self, env_steps: int | None, updates: int, wall_seconds: float, metrics: Mapping[str, float], **words: str
    ) -> None:
        """Write metrics. Boards count environment steps, or updates if there is no environment (env_steps None).
        words: texts for metrics.jsonl and the sinks."""
        counts = {"updates": updates} if env_steps is None else {"env_steps": env_steps, "updates": updates}
        line: dict[str, float | str] = {**counts, "wall_seconds": round(wall_seconds, 3), **metrics, **words}
        self._append(json.dumps(line | self._marks) + "\n")
        self._marks = {}
        for sink in self._sinks:
            sink(line)
        self.open_boards()
        for board in self._boards or ():
            board.write(updates if env_steps is None else env_steps, metrics)

    def _append(self, line: str) -> None:
        """Append a line. If the disk is full, lines are lost but the run goes on; the first loss is logged."""
        try:
            if not (self._dir / "metrics.jsonl").exists():  # the directory was deleted
                self._open()
                self._boards = self._boards and renew_files(self._boards, self._dir)
            self._file.write(line)
        except OSError as error:
            if not self._refused:
                logger.warning("metrics.jsonl cannot be written (%s): lines are missing from now on.", error)
            self._refused = True

    def picture(self, env_steps: int, name: str, image: Array) -> None:
        """Show an image [H, W, 3] uint8 on the boards."""
        self.open_boards()
        for board in self._boards or ():
            board.picture(env_steps, name, image)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the loss is logged already
            self._file.close()
        for board in self._boards or ():
            board.close()
