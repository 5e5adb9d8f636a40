"""Operations of one update and one act: python -m benchmarks.operations

Counted below autograd, backward and optimiser included, on the CPU. Views and bare allocations start no kernel and are
not counted. Matrix products are torch's, as on a GPU, whatever the CPU (`worldloom.products`). On a GPU each operation
is at least one kernel launch; `benchmarks.gpu` counts the kernels themselves. TD-MPC2 acts by planning; its layers have
other forms on a GPU than on a CPU, which the columns "as on a GPU" count. DreamerV3's cannot be counted so: a CPU
composes from many operations what is one on a GPU.

With --compiled updates are compiled too, and the kernels counted that they run on the CPU (minutes). With --r2dreamer
DIR or --tdmpc2 DIR, checkouts of the authors' code, theirs is counted in the same way, eager as it is on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.counting import Counted, count_kernels
from benchmarks.learner import make_agent, random_batch, run_reference, size_of
from worldloom import functional, products

Model = tuple[str, str, int, int]  # its name, observations, and the rows of a batch
MODELS: tuple[Model, ...] = (
    ("dreamerv3:size1m", "walker", 16, 64),
    ("dreamerv3:size1m", "image", 8, 32),
    ("dreamerv3:size12m", "image", 4, 16),
    ("tdmpc2:1m", "vector", 256, 4),
    ("tdmpc2:5m", "vector", 256, 4),
)


@patch.object(products, "WORTH", float("inf"))
def count(model: Model) -> tuple[Counter[str], Counter[str]]:
    """Count the operations of an update, and of an act for one environment."""
    agent: Any = make_agent(*model, "cpu")
    given = agent.learning.stage(random_batch(agent, "cpu"))
    agent.learning.core(given)  # the first makes the optimiser's state
    with Counted() as update:
        agent.learning.core(given)
    shape = agent.world_model.obs_shape
    shapes = shape if isinstance(shape, dict) else {"obs": shape}
    seen = {name: np.zeros((1, *size), np.uint8 if len(size) == 3 else np.float32) for name, size in shapes.items()}
    observation = seen if isinstance(shape, dict) else seen["obs"]
    _, state = agent.act(observation, None, np.ones(1, bool))
    with Counted() as act:
        agent.act(observation, state, np.zeros(1, bool))
    return update.calls, act.calls


@patch.object(products, "WORTH", float("inf"))
def count_compiled(model: Model) -> Counter[str]:
    """Count the kernels of a compiled update."""
    import torch._inductor.config as inductor

    agent: Any = make_agent(*model, "cpu")
    batch = random_batch(agent, "cpu")
    with inductor.patch({"cpp.enable_kernel_profile": True}):
        agent.configure_learning("float32", True)
        for _ in range(2):
            agent.update(batch)
        return count_kernels(lambda: agent.update(batch))


def count_authors(model: Model, options: argparse.Namespace) -> tuple[int, int] | None:
    """Count the operations of an update and an act of the authors' code, if there is a checkout of it."""
    (family, size), (_, obs, batch, length) = model[0].split(":"), model
    tdmpc2 = family == "tdmpc2"
    checkout, program = (options.tdmpc2, "tdmpc2") if tdmpc2 else (options.r2dreamer, "r2dreamer")
    if checkout is None:
        return None
    settings = {"size": size_of(family, size), "obs": obs, "batch": batch, "length": length, "device": "cpu"}
    settings |= {"threads": torch.get_num_threads(), "precision": "float32", "compile": False}
    settings |= {"count": True, "warmup": 1}
    found = run_reference(program, options.reference_python, checkout, settings)
    return int(found["update"][0]), int(found["plan" if tdmpc2 else "act_1"][0])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.operations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--top", type=int, default=0, help="also name so many of the most frequent operations")
    parser.add_argument("--compiled", action="store_true", help="count the kernels of compiled updates too")
    parser.add_argument("--r2dreamer", type=Path, help="checkout of NM512/r2dreamer")
    parser.add_argument("--tdmpc2", type=Path, help="checkout of nicklashansen/tdmpc2")
    parser.add_argument("--reference-python", default=sys.executable, help="a Python that has what they need")
    return parser.parse_args()


def main() -> None:
    options = parse()
    heads = f"{'update':>9}{'act':>7}{'as on a GPU':>16}{'compiled':>10}{'authors':>16}"
    print(f"torch {torch.__version__}\n{'model':20}{'obs':9}{'batch':>9}{heads}")
    for model in MODELS:
        name, obs, batch, length = model
        update, act = count(model)
        gpu = compiled = authors = ""
        if name.startswith("tdmpc2"):
            with patch.object(functional, "eager_on_cpu", lambda x: False):
                gpu = "{:9,}{:7,}".format(*(calls.total() for calls in count(model)))
        kernels = count_compiled(model) if options.compiled else Counter()
        if kernels:
            compiled = f"{kernels.total():,}"
        if theirs := count_authors(model, options):
            authors = "{:9,}{:7,}".format(*theirs)
        rows = f"{batch} x {length}"
        start = f"{name:20}{obs:9}{rows:>9}{update.total():9,}{act.total():7,}"
        print(f"{start}{gpu:>16}{compiled:>10}{authors:>16}".rstrip(), flush=True)
        for title, found in (("", update), ("compiled: ", kernels)):
            for operation, times in found.most_common(options.top):
                print(f"{'':24}{title + operation:40}{times:7,}")


if __name__ == "__main__":
    main()
