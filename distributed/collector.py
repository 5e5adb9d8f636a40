"""A remote env actor as the coordinator sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EVALUATION = "evaluation"


@dataclass
class Collector:
    """One remote env actor and what it is doing."""

    index: int
    incarnation: int
    handle: Any
    coming: Any  # reference to the id of its node, ready once it is up
    node: str | None = None  # once it is up
    version: int = -1  # of the weights that it holds
    task: Any = None  # reference to the info of the collect, or to the evaluation, that is under way
    chunk: Any = None  # reference to the chunk, or EVALUATION
    requested: int = 0  # environment steps
    since: float = 0.0
    restarts: int = 0
    leaving: bool = False  # its node is about to go: it is moved once its chunk is here

    @property
    def idle(self) -> bool:
        """Up, with nothing to do, and to stay."""
        return self.task is None and self.node is not None and not self.leaving

    @property
    def evaluating(self) -> bool:
        """Whether what is under way is an evaluation."""
        return self.task is not None and self.chunk is EVALUATION
