"""Measures what several learners cost and give: python -m benchmarks.learners --model dreamerv3:size1m --obs walker

One learner and two make the same updates of the same batches, on CPUs joined by gloo; two halve the windows of each.
Seconds in the collectives include the wait for the other learner. The all-reduce alone sums as many bytes between
learners that wait for each other first. With --paper nothing is measured: bytes, seconds and efficiency of 1 to 8 GPUs
follow from the numbers in `PAPER`.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import queue
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.learner import OBSERVATIONS, WARMUP, make_agent, random_batch, update
from worldloom.gang import Gang

ALONE_REPEATS = 20  # all-reduces that are timed alone

PAPER = {  # parameters in millions, seconds of one update on one GPU: measured on an H200 (docs/results.md), or assumed
    "DreamerV3 size12m": (12, 0.029),
    "DreamerV3 size200m": (200, 0.129),
    "TD-MPC2 317m (its update is assumed)": (317, 0.020),
}
SIZES, BANDWIDTHS = (1, 2, 4, 8), (25e9, 400e9)  # GPUs; bytes a second of each GPU's link


@dataclass(frozen=True)
class TimedGang(Gang):
    """A gang that notes the seconds of its collectives and the bytes that it gives to them."""

    spent: list[tuple[float, int]] = field(default_factory=list)

    def gather(self, part: Tensor) -> Tensor:
        with self._noting(part.numel() * part.element_size()):
            return super().gather(part)

    def summed(self, part: Tensor) -> Tensor:
        with self._noting(part.numel() * part.element_size()):
            return super().summed(part)

    @contextlib.contextmanager
    def _noting(self, size: int) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.spent.append((time.perf_counter() - begun, size))


@dataclass(frozen=True)
class Measured:
    """Holds medians over the updates of one learner."""

    seconds: float  # of an update
    collective: float  # of them in collectives
    sent: int  # bytes given to collectives
    alone: float  # seconds of one all-reduce of so many bytes, nobody waiting for anybody


def share_of(batch: Any, gang: Gang) -> Any:
    def part(entry: Any) -> Any:
        return {key: part(value) for key, value in entry.items()} if isinstance(entry, dict) else gang.share(entry, 0)

    return {name: part(entry) for name, entry in batch.items()}


def measure(options: argparse.Namespace, gang: TimedGang) -> Measured:
    """Make updates as one of a gang."""
    agent: Any = make_agent(options.model, options.obs, options.batch, options.length, "cpu")
    agent.configure_learning("float32", False)
    agent.learning.join(gang)
    batch = share_of(random_batch(agent, "cpu"), gang)
    seconds, spent = [], []
    for number in range(WARMUP + options.updates):
        gang.spent.clear()
        took = update(agent, batch)
        if number >= WARMUP:
            seconds.append(took)
            spent.append(sum(each for each, _ in gang.spent))
    sent = sum(size for _, size in gang.spent)
    alone = time_all_reduce(sent // 4) if gang.size > 1 else 0.0
    return Measured(statistics.median(seconds), statistics.median(spent), sent if gang.size > 1 else 0, alone)


def time_all_reduce(numbers: int) -> float:
    """Return the median seconds of an all-reduce of so many float32."""
    flat, seconds = torch.zeros(numbers), []
    for _ in range(ALONE_REPEATS):
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce(flat)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def learn(rank: int, size: int, threads: int, folder: str, options: argparse.Namespace, answers: Any) -> None:
    """Measure in a process of its own; answer with what was found, or with the error."""
    torch.set_num_threads(threads)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    try:
        answers.put((rank, measure(options, TimedGang(rank, size))))
    except BaseException as error:
        answers.put((rank, error))
        raise


def measure_together(size: int, threads: int, options: argparse.Namespace) -> Measured:
    """Return what rank 0 of so many processes measures."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        places = [(rank, size, threads, folder, options, answers) for rank in range(size)]
        processes = [context.Process(target=learn, args=place, daemon=True) for place in places]
        for process in processes:
            process.start()
        found: dict[int, Measured] = {}
        try:
            while len(found) < size:
                rank, answer = take(answers, processes)
                if not isinstance(answer, Measured):
                    raise RuntimeError(f"learner/{rank} failed: {answer!r}") from answer
                found[rank] = answer
        finally:
            for process in processes:
                if len(found) < size:  # one waits for another that failed
                    process.kill()
                process.join()
    return found[0]


def take(answers: Any, processes: Sequence[Any]) -> tuple[int, Any]:
    """Return the next answer. Raises RuntimeError if a process ended without one."""
    while True:
        ended = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
        try:
            rank, answer = answers.get(timeout=5.0)
            return int(rank), answer
        except queue.Empty:
            if ended:
                raise RuntimeError(f"learner/{ended[0]} ended without an answer.") from None


def reduce_seconds(parameters: float, size: int, bandwidth: float) -> float:
    """Return the seconds of a ring all-reduce of float32 gradients, of which each GPU sends 2 (size - 1) / size."""
    return 2 * (size - 1) / size * 4 * parameters / bandwidth


def efficiency(parameters: float, update_seconds: float, size: int, bandwidth: float) -> float:
    """Return the updates a second of `size` GPUs divided by `size` times those of one, if each computes its share of
    the batch in its share of the time."""
    computed = update_seconds / size
    return computed / (computed + reduce_seconds(parameters, size, bandwidth))


def paper_table() -> list[str]:
    """Return the rows of a table in Markdown."""
    rows = ["| | GPUs | all-reduce of | seconds at 25 GB/s | efficiency | seconds at 400 GB/s | efficiency |"]
    rows.append("|---|---|---|---|---|---|---|")
    for name, (millions, seconds) in PAPER.items():
        for size in SIZES:
            columns = [name, str(size), f"{4 * millions:,} MB"]
            for bandwidth in BANDWIDTHS:
                reduced = reduce_seconds(millions * 1e6, size, bandwidth)
                columns += [f"{reduced:.4f}", f"{efficiency(millions * 1e6, seconds, size, bandwidth):.0%}"]
            rows.append(f"| {' | '.join(columns)} |")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.learners", description=__doc__)
    parser.add_argument("--model", default="dreamerv3:size1m")
    parser.add_argument("--obs", default="walker", choices=OBSERVATIONS)
    parser.add_argument("--batch", type=int, default=16, help="windows of all learners together")
    parser.add_argument("--length", type=int, default=64, help="trained rows per window (DreamerV3)")
    parser.add_argument("--updates", type=int, default=10, help="timed updates")
    parser.add_argument("--paper", action="store_true", help="print the arithmetic for GPUs")
    options = parser.parse_args(arguments)
    if options.paper:
        print("\n".join(paper_table()))
        return
    print(f"{options.model}, {options.obs}, {options.batch} windows, float32, torch {torch.__version__}\n")
    print("| learners | threads of each | updates/s | in collectives | given to them | one all-reduce alone |")
    print("|---|---|---|---|---|---|")
    for size, threads in ((1, 1), (1, 2), (2, 1)):
        m = measure_together(size, threads, options)
        waits = (
            f"{m.collective / m.seconds:.1%} | {m.sent / 1e6:.2f} MB | {1e3 * m.alone:.1f} ms" if m.sent else " | | "
        )
        print(f"| {size} | {threads} | {1 / m.seconds:.2f} | {waits} |", flush=True)


if __name__ == "__main__":
    main()
