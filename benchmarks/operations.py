"""Operations of one update and one act, eager: python -m benchmarks.operations

Counted below autograd, backward and optimiser included, on the CPU. Views and bare allocations start no kernel and are
not counted. Matrix products are torch's, as on a GPU, whatever the CPU (`worldloom.products`). On a GPU each operation
is at least one kernel launch; `benchmarks.gpu` counts the kernels themselves. TD-MPC2's layers have other forms on a
GPU than on a CPU, which the columns "as on a GPU" count. DreamerV3's cannot be counted so: a CPU composes from many
operations what is one on a GPU.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.learner import make_agent, random_batch
from worldloom import functional, products

MODELS = (  # observations, and the rows of a batch
    ("dreamerv3:size1m", "walker", 16, 64),
    ("dreamerv3:size1m", "image", 8, 32),
    ("dreamerv3:size12m", "image", 4, 16),
    ("tdmpc2:1m", "vector", 256, 4),
    ("tdmpc2:5m", "vector", 256, 4),
)
FREE = ("empty", "new_empty", "detach", "lift_fresh", "_unsafe_view")  # operations that start no kernel, beside views


class Counted(TorchDispatchMode):
    """How often each operation is called that computes something."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        returned = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if not is_view and not name.startswith(FREE) and "profiler" not in func._schema.name:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


@patch.object(products, "WORTH", float("inf"))
def count(model: str, obs: str, batch: int, length: int) -> tuple[Counter[str], Counter[str]]:
    """Count the operations of an update, and of an act for one environment."""
    agent: Any = make_agent(model, obs, batch, length, "cpu")
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.operations", description=__doc__)
    parser.add_argument("--top", type=int, default=0, help="also name so many of the most frequent operations")
    options = parser.parse_args()
    heads = f"{'update':>9}{'act':>7}"
    print(f"torch {torch.__version__}\n{'model':20}{'obs':9}{'batch':>9}{heads}{'as on a GPU':>19}")
    for model, obs, batch, length in MODELS:
        update, act = count(model, obs, batch, length)
        rows, more = f"{batch} x {length}", ""
        if model.startswith("tdmpc2"):
            with patch.object(functional, "eager_on_cpu", lambda x: False):
                more = "{:12,}{:7,}".format(*(calls.total() for calls in count(model, obs, batch, length)))
        print(f"{model:20}{obs:9}{rows:>9}{update.total():9,}{act.total():7,}{more}", flush=True)
        for name, times in update.most_common(options.top):
            print(f"{'':24}{name:40}{times:7,}")


if __name__ == "__main__":
    main()
