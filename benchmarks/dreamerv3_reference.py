"""Seconds per update of the authors' JAX code, run by `benchmarks.learner --reference`, in a Python of its own.

python benchmarks/dreamerv3_reference.py CHECKOUT OPTIONS: CHECKOUT holds danijar/dreamerv3, OPTIONS are JSON. That
Python needs jax 0.4.33, ninjax, optax, chex, einops, elements, granular, jaxtyping, portal, scope, colored_traceback,
ruamel.yaml. With jax 0.11 their calls of jax.jit must name the shardings they pass by position. Prints the seconds of
each update as JSON in the last line. With the option "lock" (a file) updates are timed while holding it, so that
several references may warm up at once. Imports nothing of WorldLoom.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = {"walker": {"height": (), "orientations": (14,), "velocity": (9,)}, "image": {"image": (64, 64, 3)}}
ACTIONS = 6


def make_config(checkout: Path, options: dict[str, Any]) -> Any:
    import elements
    from ruamel.yaml import YAML

    presets = YAML(typ="safe").load((checkout / "dreamerv3" / "configs.yaml").read_text())
    presets["defaults"]["jax"]["precompile"] = False  # which would compile their report beside the training step
    config = elements.Config(presets["defaults"]).update(presets[options["size"]])
    jax = {"platform": options["device"], "compute_dtype": options["precision"], "prealloc": False}
    run = {"batch_size": options["batch"], "batch_length": options["length"], "report_length": options["length"]}
    return config.update({"jax": jax, "logdir": tempfile.mkdtemp(), **run})


def make_agent(config: Any, shapes: dict[str, tuple[int, ...]]) -> Any:
    import elements
    from dreamerv3.agent import Agent

    observations = {name: elements.Space(np.uint8 if len(s) == 3 else np.float32, s) for name, s in shapes.items()}
    flags = {name: elements.Space(bool) for name in ("is_first", "is_last", "is_terminal")}
    actions = {"action": elements.Space(np.float32, (ACTIONS,), -1, 1)}
    rest = (
        "logdir",
        "seed",
        "jax",
        "batch_size",
        "batch_length",
        "replay_context",
        "report_length",
        "replica",
        "replicas",
    )
    settings = elements.Config(**config.agent, **{name: config[name] for name in rest})
    return Agent({**observations, **flags, "reward": elements.Space(np.float32)}, actions, settings)


def random_batch(agent: Any, rows: tuple[int, int]) -> dict[str, Any]:
    """Numbers as replay would give them: an episode starts in the middle of each window."""
    rng = np.random.default_rng(0)
    batch: dict[str, Any] = {}
    for name, space in agent.spaces.items():
        if np.issubdtype(space.dtype, np.floating):
            batch[name] = rng.normal(size=(*rows, *space.shape)).astype(space.dtype)
        elif space.dtype == np.uint8 and len(space.shape) == 3:
            batch[name] = rng.integers(256, size=(*rows, *space.shape), dtype=np.uint8)
        else:
            batch[name] = np.zeros((*rows, *space.shape), space.dtype)
    batch["is_first"][:, rows[1] // 2] = True
    batch["is_last"][:, rows[1] // 2 - 1] = True
    batch["consec"] = np.zeros(rows, np.int32)
    return batch


def main() -> None:
    checkout, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    sys.path.insert(0, str(checkout))
    import jax
    from embodied.jax import internal
    from turns import turn

    config = make_config(checkout, options)
    begun = time.perf_counter()
    if options["obs"] not in SHAPES:
        sys.exit(f"--obs is {options['obs']}, expected {' or '.join(SHAPES)} beside the authors' code.")
    agent = make_agent(config, SHAPES[options["obs"]])
    print(f"agent made in {time.perf_counter() - begun:.1f} s", flush=True)
    rows = (options["batch"], options["length"] + config.replay_context)
    batch = internal.device_put(random_batch(agent, rows), agent.train_sharded)
    carry = agent.init_train(options["batch"])

    def once(count: int) -> float:
        nonlocal carry
        seed = agent._seeds(count, agent.train_mirrored)
        begun = time.perf_counter()
        carry, _, _ = agent.train(carry, {**batch, "seed": seed})
        jax.block_until_ready(agent.params)
        return time.perf_counter() - begun

    warmup = [once(count) for count in range(options["warmup"])]
    print(f"update: {options['warmup']} warm-up calls in {sum(warmup):.1f} s", flush=True)
    with turn(options):
        seconds = [once(options["warmup"] + count) for count in range(options["repeats"])]
    print(json.dumps({"update": seconds}))


if __name__ == "__main__":
    main()
