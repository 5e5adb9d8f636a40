"""Chunks on their way to replay, as the coordinator sees them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from functools import cached_property
from typing import Any

from distributed.serving import blame_server
from distributed.shards import ChunkLost, Shards
from distributed.state import State
from worldloom.replay.chunk import ChunkInfo, row_bytes
from worldloom.runs.build import replay_columns

CHUNKS_UNDER_WAY = 2  # of one actor
BYTES_UNDER_WAY = 128 * 2**20  # of all chunks together; at least one may be under way


class Inserting:
    """Hands chunks to replay, and counts their steps once replay has accepted them."""

    def __init__(self, state: State, replay: Shards) -> None:
        self._state, self._replay = state, replay
        self.under_way: dict[Any, ChunkInfo] = {}  # by reference to what replay accepted
        self.steps = 0  # environment steps in the chunks under way
        self._chunks: Counter[int] = Counter()  # under way, by actor

    @cached_property
    def _steps_allowed(self) -> int:
        """Environment steps that may be under way, so that they do not fill the object store."""
        return max(BYTES_UNDER_WAY // row_bytes(replay_columns(self._state.env, self._state.spec)), 1)

    def accepts(self, actor: int) -> bool:
        """Return whether an actor may collect again: the last but one of its chunks is accepted, and there is room."""
        return self._chunks[actor] < CHUNKS_UNDER_WAY and self.steps < self._steps_allowed

    def begin(self, chunk: Any, info: ChunkInfo) -> None:
        """Hand a Chunk, or a reference to one, to replay. Raises ActorLost if it ended because nobody acted."""
        self.under_way[self._replay.insert(chunk, info.key.actor)] = info
        self.steps += info.steps
        self._chunks[info.key.actor] += 1
        if info.acting_lost:
            blame_server(self._state, info.acting_lost)

    def take(self, ready: Collection[Any]) -> None:
        """Count what replay accepted. Raises ActorLost."""
        for reference in [r for r in ready if r in self.under_way]:
            info = self.under_way[reference]
            try:
                self._replay.take_acceptance(reference, info.key.actor)
            except ChunkLost:  # with its actor's node: the actor's next incarnation starts new episodes
                self._count_discarded(self._forget(reference).steps)
                continue
            self._forget(reference)
            self._replay.count(self._state.run.limiter)
            self._state.run.recorder.chunk(info, self._state.version)

    def discard(self, shards: Collection[int]) -> int:
        """Forget chunks on their way to these shards; return their environment steps."""
        lost = [r for r, info in self.under_way.items() if self._replay.shard_of(info.key.actor) in shards]
        steps = sum(self._forget(reference).steps for reference in lost)
        self._count_discarded(steps)
        return steps

    def _forget(self, reference: Any) -> ChunkInfo:
        info = self.under_way.pop(reference)
        self.steps -= info.steps
        self._chunks[info.key.actor] -= 1
        return info

    def _count_discarded(self, env_steps: int) -> None:
        self._state.run.recorder.counters["env_steps_discarded"] += env_steps
