"""The replay actors of a run, as one replay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distributed.actors.replay import ReplayActor
from distributed.launcher import ActorLost, Launcher, alive, result_of
from distributed.watching import Watch
from worldloom.replay.buffer import Acceptance
from worldloom.runs.build import AgentSpec, EnvSpec
from worldloom.runs.config import RunConfig
from worldloom.runs.limiter import RateLimiter

NOTHING = Acceptance(0, 0, 0, 0, 0, 0)
THREADS = {"saving": 1, "control": 1}


class ChunkLost(RuntimeError):
    """A chunk went with the node that held it before replay had copied it."""


class Shards:
    """Chunks go to the shard of their env actor; a batch comes from one shard, drawn in proportion to its windows."""

    def __init__(self, launcher: Launcher, config: RunConfig, env: EnvSpec, run_dir: Path) -> None:
        self._launcher = launcher
        self._config, self._env, self._run_dir = config, env, run_dir
        self._rng = np.random.default_rng([config.train.seed, 0x54A2D])
        self.handles: list[Any] = [None] * config.replay.shards
        self.nodes: list[str] = [""] * config.replay.shards  # their ids
        self.accepted = [NOTHING for _ in self.handles]

    def launch(self) -> None:
        """Start the processes while the learner starts, unless its node decides where they go: see `start`."""
        spread = len(self.handles) > 1 and self._config.runtime.learners == 1
        if spread or sum(node["Alive"] for node in ray.nodes()) == 1:
            for shard in range(len(self.handles)):
                self._launch(shard, "SPREAD")

    def start(self, spec: AgentSpec, nodes: Sequence[str], watch: Watch) -> None:
        """Start all of them; a single one on the node of the first learner, where its batches need no copy between
        machines, and those of several learners on their nodes in turn. nodes: ids of the learners' nodes."""
        self._spec, self._watch = spec, watch
        for shard, handle in enumerate(self.handles):
            if handle is None:
                self._launch(shard, near(shard, nodes))
        for shard, opened in enumerate([self._open(shard) for shard in range(len(self.handles))]):
            self._opened(shard, opened)

    def _launch(self, shard: int, where: Any) -> None:
        self.handles[shard] = self._launcher.start(ReplayActor, self.name(shard), shard, threads=THREADS, where=where)

    def _open(self, shard: int) -> Any:
        """Open a shard; return a reference to the id of its node."""
        return self.handles[shard].open.remote(self._config, self._env, self._spec, self._run_dir)

    def _opened(self, shard: int, opened: Any) -> None:
        self.nodes[shard] = self._launcher.wait(opened, self.name(shard))
        self._watch.follow(self.name(shard), self.handles[shard], self._config.runtime.replay_timeout)

    @staticmethod
    def name(shard: int) -> str:
        return f"replay/{shard}"

    def shard_of(self, actor: int) -> int:
        return actor % len(self.handles)

    @property
    def steps(self) -> int:
        """Environment steps that all shards have accepted together."""
        return sum(accepted.steps for accepted in self.accepted)

    def count(self, limiter: RateLimiter) -> None:
        """Tell the limiter what was accepted, and whether a batch can be drawn."""
        limiter.env_steps, limiter.drawable = self.steps, any(accepted.windows for accepted in self.accepted)

    def insert(self, chunk: Any, actor: int) -> Any:
        """Hand over a Chunk, or a reference to one; return a reference to what replay then has accepted."""
        return self.handles[self.shard_of(actor)].insert.remote(chunk)

    def take_acceptance(self, reference: Any, actor: int) -> None:
        """Take in the result of an insert. Raises ActorLost, ChunkLost."""
        shard = self.shard_of(actor)
        try:
            accepted: Acceptance = result_of(reference, self.name(shard))
        except ActorLost as error:
            if alive(self.handles[shard]):
                raise ChunkLost(str(error)) from error
            raise
        if accepted.chunks + accepted.duplicates >= self.accepted[shard].chunks + self.accepted[shard].duplicates:
            self.accepted[shard] = accepted

    def sample(self, batches: int, learners: int = 1) -> tuple[list[Any], int]:
        """Return references to so many batches, one to each learner's part of all of them, and their shard."""
        shard = self.draw()
        handle = self.handles[shard]
        if learners == 1:
            return [handle.sample.remote(batches)], shard
        return handle.sample_shares.options(num_returns=learners).remote(batches, learners), shard

    def draw(self) -> int:
        """Draw the shard that the next batches come from."""
        windows = np.array([accepted.windows for accepted in self.accepted], np.float64)
        if len(windows) == 1 or not windows.any():
            return int(np.argmax([accepted.rows for accepted in self.accepted]))
        return int(self._rng.choice(len(windows), p=windows / windows.sum()))

    def write_back(self, shard: int, written: Any) -> Any:
        return self.handles[shard].write_back.remote(written)

    def draw_sequence(self, rows: int, seed: int) -> Any:
        """Return a reference to columns of one episode of the shard that holds most."""
        shard = int(np.argmax([accepted.windows for accepted in self.accepted]))
        return self.handles[shard].draw_sequence.remote(rows, seed)

    # Saving

    def snapshot(self) -> list[Any]:
        """Copy what each shard has to write; return references for `write`."""
        return [handle.snapshot.remote() for handle in self.handles]

    def write(self, folder: Path, snapshots: list[Any]) -> list[Any]:
        """Write each shard's copy while the run goes on; return references to the files' names."""
        return [handle.write.remote(folder, taken) for handle, taken in zip(self.handles, snapshots, strict=True)]

    def save(self, folder: Path) -> list[Any]:
        """Write each shard without a copy, while nothing else goes on; return references as `write`."""
        return [handle.save.remote(folder) for handle in self.handles]

    def load(self, checkpoint: Path) -> int:
        """Load all shards; return how many rows are lost with damaged files. Raises ActorLost, CheckpointError."""
        loading = [handle.load.remote(checkpoint) for handle in self.handles]
        return sum(self._loaded(shard, reference) for shard, reference in enumerate(loading))

    def _loaded(self, shard: int, reference: Any) -> int:
        self.accepted[shard], lost = self._launcher.result(reference, self.name(shard))
        return int(lost)

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self._rng.bit_generator.state}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore the draws; state is None for a run of a single shard in one process, where nothing was drawn."""
        if state is not None:
            self._rng.bit_generator.state = state["rng"]

    # Recovery

    def dead(self) -> list[int]:
        return [shard for shard, handle in enumerate(self.handles) if not alive(handle)]

    def restart(self, shard: int, nodes: Sequence[str], checkpoint: Path | None) -> int:
        """Start a shard again from the checkpoint, or empty; return how many rows are lost with damaged files."""
        self._watch.forget(self.name(shard))
        self._launcher.end(self.handles[shard])
        spread = len(self.handles) > 1 and self._config.runtime.learners == 1
        self._launch(shard, "SPREAD" if spread else near(shard, nodes))
        self._opened(shard, self._open(shard))
        if checkpoint is None:
            self.accepted[shard] = NOTHING
        return self._loaded(shard, self.handles[shard].load.remote(checkpoint)) if checkpoint else 0


def near(shard: int, nodes: Sequence[str]) -> NodeAffinitySchedulingStrategy:
    """Return where a shard goes that is to be near the learners: on their nodes in turn."""
    distinct = list(dict.fromkeys(nodes))
    return NodeAffinitySchedulingStrategy(distinct[shard % len(distinct)], soft=True)
