"""How much may be collected: up to total_steps, and not too far ahead of learning."""

from __future__ import annotations

import math
import time

from distributed.inserting import Inserting
from distributed.state import State

RATE_SECONDS = 1.0  # over which chunks are counted


class ChunkSize:
    """The vector steps of a collect: a few, or so many that no more than `rate` chunks arrive each second."""

    def __init__(self, least: int, rate: float) -> None:
        self._least, self._rate = least, rate
        self._growth = 1.0
        self._since, self._chunks = time.monotonic(), 0

    def count(self) -> None:
        """Count a chunk that arrived."""
        self._chunks += 1

    def steps(self) -> int:
        """Return the vector steps of the next collect; look at the rate of chunks each second."""
        elapsed = time.monotonic() - self._since
        if elapsed >= RATE_SECONDS:
            self._growth = max(self._growth * self._chunks / elapsed / self._rate, 1.0)
            self._since, self._chunks = time.monotonic(), 0
        return math.ceil(self._least * self._growth)


class Budget:
    """Counts what is collected, under way and left. requested: environment steps that env actors were asked for."""

    def __init__(self, state: State, inserting: Inserting) -> None:
        self._state, self._inserting = state, inserting
        self.size = ChunkSize(state.limits.chunk_steps, state.limits.chunks_per_second)
        self.requested = 0
        self._held_since: float | None = None

    def steps(self) -> int:
        """Return the vector steps for the next collect, 0 once total_steps are collected or under way."""
        config, under_way = self._state.config, self.requested + self._inserting.steps
        left = config.train.total_steps - self._state.run.limiter.env_steps - under_way
        return max(min(self.size.steps(), math.ceil(left / config.env.num_envs)), 0)

    def too_far_ahead(self) -> bool:
        """Return whether collecting leads by more than one round of chunks and what the next update takes."""
        runtime, limiter = self._state.config.runtime, self._state.run.limiter
        actors, envs = max(runtime.env_actors, 1), self._state.config.env.num_envs
        round_of_chunks = self._state.limits.chunk_steps * envs * actors
        return limiter.steps_ahead(self._inserting.steps) > round_of_chunks + 1 / limiter.updates_per_step

    def count_held_time(self, held: bool) -> None:
        """Record the time for which collecting is held up, until the next call."""
        now = time.monotonic()
        if self._held_since is not None:
            self._state.run.recorder.held(now - self._held_since)
        self._held_since = now if held else None
