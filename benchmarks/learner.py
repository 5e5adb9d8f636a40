"""Seconds per update of an agent: python -m benchmarks.learner --model dreamerv3:size1m --obs walker

Batches are random numbers of the right shapes in device memory; sampling is not timed, warm-up updates are excluded.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import numpy as np
import torch

from worldloom.catalog import agent_from_description, build_config, resolve
from worldloom.types import Agent

OBSERVATIONS: dict[str, tuple[Any, int]] = {  # shapes and action size
    "walker": ({"height": (), "orientations": (14,), "velocity": (9,)}, 6),
    "vector": ((39,), 4),
    "image": ((3, 64, 64), 6),
}


def make_agent(model: str, obs: str, batch: int, length: int, device: str) -> Agent:
    shape, action_dim = OBSERVATIONS[obs]
    family, _ = resolve(model)
    fields = {"dreamerv3": {"batch_size": batch, "batch_length": length}, "tdmpc2": {"batch_size": batch}}[family]
    config = build_config(model, fields)
    description = {
        "family": family,
        "obs_shape": shape,
        "action_dim": action_dim,
        "episode_length": 500,
        "config": {name: getattr(config, name) for name in config.__dataclass_fields__},
    }
    return agent_from_description(description, device)


def random_batch(agent: Agent, device: str) -> Any:
    """Numbers as replay would give them."""
    generator = torch.Generator().manual_seed(0)
    lead = (agent.batch_size, agent.windows.length)
    shape = agent.world_model.obs_shape

    def observation(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 3:
            return torch.randint(256, (*lead, *shape), dtype=torch.uint8, generator=generator)
        return torch.randn(*lead, *shape, generator=generator)

    obs = {k: observation(v) for k, v in shape.items()} if isinstance(shape, dict) else observation(shape)
    first = torch.zeros(lead, dtype=torch.bool)
    first[:, lead[1] // 2] = True
    batch: dict[str, Any] = {
        "actions": torch.rand(*lead, agent.world_model.action_dim, generator=generator) * 2 - 1,
        "rewards": torch.randn(lead, generator=generator),
        "is_first": first,
        "terminated": torch.zeros(lead, dtype=torch.bool),
        "truncated": first.roll(-1, 1),
    }
    for name, column in agent.columns.items():
        batch[name] = torch.from_numpy(np.zeros((*lead, *column.shape), column.dtype))
    moved = {name: value.to(device) for name, value in batch.items()}
    moved["obs"] = {k: v.to(device) for k, v in obs.items()} if isinstance(obs, dict) else obs.to(device)
    return moved


def seconds(agent: Agent, batch: Any, device: str) -> float:
    begun = time.perf_counter()
    agent.update(batch)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.learner", description=__doc__)
    parser.add_argument("--model", default="dreamerv3:size1m")
    parser.add_argument("--obs", default="walker", choices=OBSERVATIONS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="trained rows per window (DreamerV3)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--updates", type=int, default=20, help="timed updates")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    agent = make_agent(options.model, options.obs, options.batch, options.length, options.device)
    batch = random_batch(agent, options.device)
    for _ in range(3):
        agent.update(batch)
    times = [seconds(agent, batch, options.device) for _ in range(options.updates)]
    size = f"batch {agent.batch_size} x {agent.windows.trained} trained rows"
    print(f"{options.model}, {options.obs}, {size}, {options.device}")
    print(f"{options.threads} threads of {os.cpu_count()} cores, torch {torch.__version__}, float32")
    print(f"{'':10}{'s/update':>10}{'best':>8}{'updates/s':>11}")
    middle = statistics.median(times)
    print(f"{'eager':10}{middle:10.3f}{min(times):8.3f}{1 / middle:11.2f}")


if __name__ == "__main__":
    main()
