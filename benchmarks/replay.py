"""Sampling from replay against memcpy of the same bytes: python -m benchmarks.replay

Draws batches of 16 x 65 rows of 64x64x3 images at 1 % and at 100 % fill, alternating with copies of as many bytes
between two places of a block as large as the filled ring, so that both read memory that the caches do not hold.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np

from worldloom.replay.buffer import ReplayBuffer
from worldloom.replay.chunk import Chunk, ChunkInfo, ChunkKey
from worldloom.types import WindowSpec

IMAGE = (3, 64, 64)
CHUNK_ROWS = 64
FLUSH_BYTES = 2**30  # read to empty the caches; more than any last-level cache


def chunk(rng: np.random.Generator, pool: np.ndarray, env: int, sequence: int) -> Chunk:
    """CHUNK_ROWS rows of random pixels for one environment; an episode lasts 500 rows."""
    numbers = np.arange(CHUNK_ROWS) + sequence * CHUNK_ROWS
    begin = int(rng.integers(len(pool) - CHUNK_ROWS))
    columns = {
        "obs": pool[begin : begin + CHUNK_ROWS],
        "actions": rng.uniform(-1, 1, (CHUNK_ROWS, 6)).astype(np.float32),
        "rewards": rng.normal(size=CHUNK_ROWS).astype(np.float32),
        "is_first": numbers % 500 == 0,
        "terminated": np.zeros(CHUNK_ROWS, bool),
        "truncated": numbers % 500 == 499,
    }
    info = ChunkInfo(ChunkKey(env, 0, sequence), CHUNK_ROWS, 0, (), (), 0, 0, "", 0.0)
    return Chunk(columns, (CHUNK_ROWS,), info)


def fill(replay: ReplayBuffer, rows: int, rng: np.random.Generator, pool: np.ndarray, envs: int = 16) -> None:
    """Insert chunks of `envs` environments in turn until `rows` rows are held."""
    sequence = replay.accepted().chunks // envs
    while len(replay) < rows:
        for env in range(envs):
            replay.insert(chunk(rng, pool, env, sequence))
        sequence += 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.replay", description=__doc__)
    parser.add_argument("--capacity", type=int, default=300_000, help="rows; 12,288 bytes of pixels each")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    pool = rng.integers(256, size=(4096, *IMAGE), dtype=np.uint8)
    spec = WindowSpec(length=65, context=1, crosses_episodes=True)
    small, full = (
        ReplayBuffer(options.capacity, IMAGE, 6, obs_dtype="uint8", windows=spec, seed=options.seed) for _ in range(2)
    )
    fill(small, options.capacity // 100, rng, pool)
    fill(full, options.capacity, rng, pool)
    size = sum(value.nbytes for value in small.draw(16).values())
    block = full._ring.columns["obs"].reshape(-1)

    def copy() -> np.ndarray:
        """A fresh copy of as many consecutive bytes, from a random place."""
        begin = int(rng.integers(len(block) - size))
        return block[begin : begin + size].copy()

    calls = {"memcpy": copy, "sample at 1 %": lambda: small.draw(16), "sample at 100 %": lambda: full.draw(16)}
    print(f"batch: 16 x 65 rows of 64x64x3 uint8, {size / 1e6:.1f} MB; capacity: {options.capacity:,} rows")
    print(f"{platform.machine()}, numpy {np.__version__}, medians of {options.repeats}, seed {options.seed}")
    print("\ncaches flushed before each call, as the update between two draws does:")
    report(measure(calls, options.repeats, flush=np.ones(FLUSH_BYTES // 8)), size)
    print("\ncalls back to back, where the last-level cache may hold the whole of the 1 % ring:")
    report(measure(calls, options.repeats, flush=None), size)


def measure(calls: dict[str, Callable[[], object]], repeats: int, flush: np.ndarray | None) -> dict[str, list[float]]:
    """Milliseconds of each call, the calls taking turns; the first tenth is warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-repeats // 10, repeats):
        for name, call in calls.items():
            if flush is not None:
                flush.sum()
            begun = time.perf_counter()
            call()
            if repeat >= 0:
                times[name].append(1000 * (time.perf_counter() - begun))
    return times


def report(samples: dict[str, list[float]], size: int) -> None:
    middle = {name: statistics.median(times) for name, times in samples.items()}
    print(f"{'':18}{'ms':>9}{'p95 ms':>9}{'GB/s':>8}{'x memcpy':>10}")
    for name, times in samples.items():
        rate, ratio = size / middle[name] / 1e6, middle[name] / middle["memcpy"]
        print(f"{name:18}{middle[name]:9.2f}{np.percentile(times, 95):9.2f}{rate:8.1f}{ratio:10.2f}")
    print(f"100 % fill against 1 %: {middle['sample at 100 %'] / middle['sample at 1 %']:.2f}x")


if __name__ == "__main__":
    main()
