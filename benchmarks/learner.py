"""Seconds per update of an agent: python -m benchmarks.learner --model dreamerv3:size1m --obs walker

Batches are random numbers of the right shapes in device memory; sampling is not timed, warm-up updates and compilation
are excluded. With --reference DIR --reference-python PYTHON the authors' code is timed in the same run. With
--forms eager or --forms compiled, the peak memory of that form is printed, compiling included, and of the authors'
code. With --representation r2dreamer infonce ne, DreamerV3 is also timed without its decoder, eager, in turn with the
update that has one:

    python -m benchmarks.learner --obs image --batch 8 --length 32 --forms eager --representation r2dreamer infonce ne

With --act the seconds of an action in one environment follow. STORM and DIAMOND take choices on images:

    python -m benchmarks.learner --model storm:tiny --obs image --batch 8 --length 32 --forms eager --act
    python -m benchmarks.learner --model diamond:tiny --obs rally --batch 16 --length 5 --forms eager --act
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldloom.families import agent_from_description, build_config, resolve
from worldloom.types import Agent

WARMUP = 3  # updates; compilation is among them
OBSERVATIONS: dict[str, tuple[Any, int]] = {  # shapes and action size
    "walker": ({"height": (), "orientations": (14,), "velocity": (9,)}, 6),
    "vector": ((39,), 4),
    "image": ((3, 64, 64), 6),
    "rally": ((3, 16, 16), 3),
}
CHOICES = ("storm", "diamond")  # families whose actions are choices here


def make_agent(model: str, obs: str, batch: int, length: int, device: str, **more: Any) -> Agent:
    shape, action_dim = OBSERVATIONS[obs]
    family, _ = resolve(model)
    rows = {"dreamerv3": "batch_length", "storm": "batch_length", "diamond": "horizon"}
    fields = {"batch_size": batch, **({rows[family]: length} if family in rows else {})}
    config = build_config(model, {**fields, **more})
    description = {
        "family": family,
        "obs_shape": shape,
        "action_dim": action_dim,
        "episode_length": 500,
        "config": {name: getattr(config, name) for name in config.__dataclass_fields__},
        **({"action_classes": (action_dim,)} if family in CHOICES else {}),
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
    actions = torch.rand(*lead, agent.world_model.action_dim, generator=generator)
    if agent.describe().get("action_classes"):
        actions = torch.nn.functional.one_hot(actions.argmax(-1), actions.shape[-1]).float()
    else:
        actions = actions * 2 - 1
    batch: dict[str, Any] = {
        "actions": actions,
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


def update(agent: Agent, batch: Any) -> float:
    """One update, in seconds."""
    begun = time.perf_counter()
    agent.update(batch)
    if agent.acting_generator.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def act_seconds(agent: Agent, batch: Any, calls: int) -> list[float]:
    """Return the seconds of each `act` in one environment, within an episode."""
    shown = batch["obs"]
    obs = {k: v[:1, 0].numpy() for k, v in shown.items()} if isinstance(shown, dict) else shown[:1, 0].cpu().numpy()
    _, state = agent.act(obs, None, np.ones(1, bool))
    seconds = []
    for _ in range(WARMUP + calls):
        begun = time.perf_counter()
        _, state = agent.act(obs, state, np.zeros(1, bool))
        seconds.append(time.perf_counter() - begun)
    return seconds[WARMUP:]


def launches(agent: Agent, batch: Any) -> int:
    """Kernels that one update starts on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        update(agent, batch)
    return sum(
        event.count for event in profile.key_averages() if event.key.startswith(("cudaLaunchKernel", "cuLaunchKernel"))
    )


def run_reference(program: str, python: str, checkout: Path, settings: dict[str, Any]) -> dict[str, list[float]]:
    """Return the numbers of the authors' code, by what was measured; it runs in its own Python, on as many cores."""
    script = Path(__file__).with_name(f"{program}_reference.py")
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[: settings["threads"]])
    command = ["taskset", "-c", cores, python, str(script), str(checkout), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the reference failed:\n{done.stderr[-2000:]}")
    found: dict[str, list[float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def size_of(family: str, size: str) -> int | str:
    """Return a size as the authors' code names it."""
    return int(size.removesuffix("m")) if family == "tdmpc2" else size


def reference_seconds(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, list[float]]:
    """Return the seconds of the authors' code, by what was timed."""
    family, size = resolve(options.model)
    common = {"size": size_of(family, size), "device": options.device, "threads": options.threads, "warmup": WARMUP}
    return run_reference(family, options.reference_python, options.reference, {**common, **settings})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.learner", description=__doc__)
    parser.add_argument("--model", default="dreamerv3:size1m")
    parser.add_argument("--obs", default="walker", choices=OBSERVATIONS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="trained rows per window; DIAMOND's imagined steps")
    parser.add_argument("--starts", type=int, help="STORM's imagined starts, at most batch x length")
    parser.add_argument("--act", action="store_true", help="time an action in one environment, too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--updates", type=int, default=20, help="timed updates")
    forms = ["eager", "compiled"]
    parser.add_argument("--forms", nargs="+", default=forms, choices=forms, help="what to time; default: both")
    parser.add_argument("--representation", nargs="+", default=[], choices=["r2dreamer", "infonce", "ne"])
    parser.add_argument("--reference", type=Path, help="checkout of the authors' code to time beside ours")
    parser.add_argument("--reference-python", default=sys.executable, help="a Python that has what it needs")
    return parser.parse_args()


def show(times: dict[str, list[float]], first: str, call: str, scale: int) -> None:
    """Print medians, in seconds / scale, beside those of the form that is named first."""
    unit = "ms" if scale == 1000 else "s"
    print(f"{'':10}{unit + '/' + call:>10}{'best':>8}{call + 's/s':>11}{'against first':>15}")
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, middle in medians.items():
        least, ratio = min(times[name]), medians[first] / middle
        print(f"{name:10}{middle * scale:10.3f}{least * scale:8.3f}{1 / middle:11.2f}{ratio:14.2f}x")


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    agents, sizes = {}, (options.model, options.obs, options.batch, options.length, options.device)
    for name in [*options.forms, *options.representation]:
        fields: dict[str, Any] = {"representation": name} if name in options.representation else {}
        fields |= {"imagination_starts": options.starts} if options.starts else {}
        agents[name] = make_agent(*sizes, **fields)
        agents[name].configure_learning(options.precision, name == "compiled")
    one = agents[options.forms[0]]
    batch = random_batch(one, options.device)
    times: dict[str, list[float]] = {name: [] for name in agents}
    for name, agent in agents.items():
        begun = time.perf_counter()
        for _ in range(WARMUP):
            update(agent, batch)
        print(f"{name}: {WARMUP} warm-up updates in {time.perf_counter() - begun:.1f} s", flush=True)
    for _ in range(options.updates):  # in turn, so that all see the same machine
        for name, agent in agents.items():
            times[name].append(update(agent, batch))
    acts = {name: act_seconds(agent, batch, options.updates) for name, agent in agents.items()} if options.act else {}
    if options.reference:
        settings = {
            "obs": options.obs,
            "precision": options.precision,
            "batch": options.batch,
            "length": options.length,
            "config": one.describe()["config"],
            "repeats": options.updates,
        }
        found = reference_seconds(options, settings)
        times["reference"] = found["update"]
        if options.act:
            acts["reference"] = found["act_1"]
    print(f"\n{options.model}, {options.obs}, {one.batch_size} x {one.windows.trained} rows, {options.device}")
    print(f"{options.threads} threads of {os.cpu_count()} cores, torch {torch.__version__}, {options.precision}")
    show(times, options.forms[0], "update", 1)
    if options.act:
        show(acts, options.forms[0], "act", 1000)
    if len(agents) == 1:
        peaks = {options.forms[0]: resource.RUSAGE_SELF}
        if options.reference:
            peaks["reference"] = resource.RUSAGE_CHILDREN
        for name, who in peaks.items():
            print(f"{name}: {resource.getrusage(who).ru_maxrss / 1024:.0f} MiB of memory at most")
    if options.device.startswith("cuda"):
        for name, agent in agents.items():
            torch.cuda.reset_peak_memory_stats()
            count = launches(agent, batch)
            print(f"{name}: {count:,} launches an update, {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB at most")


if __name__ == "__main__":
    main()
