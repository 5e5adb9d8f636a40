"""One measurement of `benchmarks.gpu`, in a process of its own: python -m benchmarks.gpu_job KIND OPTIONS

OPTIONS are JSON. Prints every figure as a line of JSON as soon as it has it, so that a job that runs out of time loses
only what it did not reach. KIND: correctness, update or act.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.learner import make_agent, random_batch
from benchmarks.turns import turn
from worldloom.tdmpc2.losses import draw_loss_noise, joint_loss

Figures = dict[str, Any]


def say(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], Any], device: str, repeats: int, options: Figures) -> Figures:
    """Median of calls that are each waited for, and the mean of calls in a row, as a learner makes them."""
    with turn(options):
        call()
        wait(device)
        each = []
        for _ in range(repeats):
            begun = time.perf_counter()
            call()
            wait(device)
            each.append(1e3 * (time.perf_counter() - begun))
        begun = time.perf_counter()
        for _ in range(repeats):
            call()
        wait(device)
        row = 1e3 * (time.perf_counter() - begun) / repeats
        share = kernel_share(call, row) if device.startswith("cuda") else {}
    return {"median_ms": round(statistics.median(each), 3), "in_a_row_ms": round(row, 3), **share}


def kernel_share(call: Callable[[], Any], wall_ms: float) -> Figures:
    """How many kernels one call runs, and their time as a share of a call's."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.device_time for e in kernels) / 1e3
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        by_name[event.name[:70]].append(event.device_time / 1e3)
    largest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:12]
    return {
        "kernels": len(kernels),
        "kernel_ms": round(busy, 3),
        "kernel_share": round(busy / wall_ms, 3),
        "largest": {name: [len(times), round(sum(times), 2)] for name, times in largest},  # calls, milliseconds
    }


def modes(options: Figures) -> Iterator[tuple[str, bool, bool]]:
    """(name, compiled, captured) of what was asked for, cheapest first."""
    table = {"eager": (False, False), "captured": (False, True), "compiled": (True, False), "both": (True, True)}
    for name in options["modes"]:
        yield (name, *table[name])


def build(options: Figures, device: str | None = None) -> Any:
    torch.manual_seed(0)
    return make_agent(
        options["model"], options["obs"], options["batch"], options.get("length", 64), device or options["device"]
    )


def update(options: Figures) -> None:
    """Milliseconds of an update in each mode. Batches come from the host's memory, as replay gives them."""
    device, compiled_agent = options["device"], None
    for name, compiled, captured in modes(options):
        begun = time.perf_counter()
        agent = compiled_agent if compiled and compiled_agent else build(options)
        if compiled and compiled_agent:
            agent._learner.captured.enabled = captured and device.startswith("cuda")
        else:
            agent.configure_learning(options["precision"], compiled, captured)
        compiled_agent = agent if compiled else None
        batch = random_batch(agent, "cpu")
        for _ in range(4):
            agent.learn(batch).arrays()
        agent.collect()
        ready = time.perf_counter() - begun
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        found = milliseconds(lambda: agent.learn(batch), device, options["repeats"], options)  # noqa: B023
        if device.startswith("cuda"):
            found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        say(mode=name, ready_s=round(ready, 1), loss=agent.collect().get("loss"), **found)


def act(options: Figures) -> None:
    """Milliseconds of `act` for several numbers of environments, actions on the host."""
    device = options["device"]
    for name, compiled, captured in modes(options):
        agent = build(options)
        agent.configure_learning("float32", compiled, captured)
        for envs in options["envs"]:
            rng, first = np.random.default_rng(0), np.zeros(envs, bool)
            shape = agent.world_model.obs_shape
            obs = rng.normal(size=(envs, *shape)).astype(np.float32)
            if len(shape) == 3:
                obs = rng.integers(256, size=(envs, *shape), dtype=np.uint8)
            _, state = agent.act(obs, None, first)
            for _ in range(3):
                _, state = agent.act(obs, state, first)
            found = milliseconds(lambda: agent.act(obs, state, first), device, options["repeats"], options)  # noqa: B023
            say(mode=name, envs=envs, **found)


def correctness(options: Figures) -> None:
    """The device against the CPU: loss and gradients from equal parameters and noise; then captured against not.

    The former is for DreamerV3 and TD-MPC2; other families draw their noise in ways of their own."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if options.get("beside_cpu", True):
        against_the_cpu(options)
    for precision in options["precisions"]:
        captured_against_not(options, precision)


def against_the_cpu(options: Figures) -> None:
    here, there = build(options, "cpu"), build(options)
    shake(here)
    there.load_state_dict(portable(here.state_dict(), there))
    batch = random_batch(here, "cpu")
    for precision in options["precisions"]:
        here.configure_learning("float32", False, False)
        there.configure_learning(precision, False, False)
        expected, found = losses_and_gradients(here, batch), losses_and_gradients(there, batch)
        worst = {name: relative(found[name], value) for name, value in expected.items()}
        say(check="against the CPU", precision=precision, loss=worst.pop("loss"), worst_gradient=max(worst.values()))


def shake(agent: Any) -> None:
    """Give the outputs that start at zero values."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        modules = [agent.world_model, *([] if agent.behaviour is None else [agent.behaviour])]
        for parameter in (p for module in modules for p in module.parameters()):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device))


def portable(state: Figures, agent: Any) -> Figures:
    """With the agent's own generators, whose states differ between kinds of devices."""
    own = agent.state_dict()
    return {**state, **{name: own[name] for name in ("generator", "acting_generator")}}


def losses_and_gradients(agent: Any, batch: Any) -> dict[str, Tensor]:
    """Noise is drawn on the CPU, so that it is the same everywhere."""
    generator, device = torch.Generator().manual_seed(7), agent.device
    given = {name: value.to(device) for name, value in agent.learning.stage(batch).items()}
    model = agent.world_model
    if hasattr(agent.learning, "loss"):
        starts = given["rewards"].numel()
        length, c = given["rewards"].shape[1], agent.config

        def exponential(*shape: int) -> Tensor:
            return -torch.rand(shape, generator=generator).log()

        posterior = exponential(length, len(given["rewards"]), c.stoch, c.classes)
        prior = exponential(c.imagination_length, starts, c.stoch, c.classes)
        policy = torch.randn(c.imagination_length + 1, starts, model.action_dim, generator=generator)
        noise = type(agent.learning.draw_noise(1, 2))(posterior.to(device), prior.to(device), policy.to(device))
        loss = agent.learning.loss(agent.learning.rows(given), agent.learning.context(given), noise)[0]
        parameters = agent.learning.optimizer.params
    else:
        drawn = draw_loss_noise(model, *given["actions"].shape[:2])
        made = {n: draw(v, generator).to(device) for n, v in vars(drawn).items() if v is not None}
        loss = joint_loss(model, given, type(drawn)(**made)).loss
        parameters = agent.learning.model_optimizer.params
    gradients = torch.autograd.grad(loss, parameters)
    return {"loss": loss.detach().cpu(), **{str(i): g.cpu() for i, g in enumerate(gradients)}}


def draw(like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of the kind of `like`, on the CPU."""
    if like.dtype == torch.bool:
        return torch.rand(like.shape, generator=generator) < 0.01
    if like.is_floating_point():
        return torch.randn(like.shape, generator=generator)
    return torch.arange(like.numel()).view(like.shape)


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the array's largest number."""
    scale = max(float(expected.abs().max()), 1e-12)
    return float((found.double() - expected.double()).abs().max()) / scale


def captured_against_not(options: Figures, precision: str) -> None:
    agents = [build(options) for _ in range(2)]
    for agent, captured in zip(agents, (False, True), strict=True):
        shake(agent)
        agent.configure_learning(precision, False, captured)
    batch = random_batch(agents[0], "cpu")
    metrics = []
    for agent in agents:
        for count in range(8):
            agent.learn({**batch, "rewards": batch["rewards"] + 0.1 * count})
        metrics.append(agent.collect())
    weights = [np.abs(a.acting_weights()) for a in agents]
    difference = float(np.abs(agents[0].acting_weights() - agents[1].acting_weights()).max() / weights[0].max())
    worst = max(abs(metrics[0][n] - metrics[1][n]) / (abs(metrics[0][n]) + 1e-6) for n in metrics[0])
    agents[1].load_acting_weights(agents[0].acting_weights())
    rng, envs = np.random.default_rng(0), 3
    states, apart = [None, None], 0.0
    for step in range(8):
        shape = agents[0].world_model.obs_shape
        obs = rng.normal(size=(envs, *shape)).astype(np.float32)
        if len(shape) == 3:
            obs = rng.integers(256, size=(envs, *shape), dtype=np.uint8)
        found = [a.act(obs, s, np.full(envs, step == 0)) for a, s in zip(agents, states, strict=True)]
        states = [state for _, state in found]
        apart = max(apart, float(np.abs(found[0][0] - found[1][0]).max()))
    say(check="captured against not, 8 updates", precision=precision, weights=difference, metrics=worst, actions=apart)


def main() -> None:
    kind, options = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(options.get("threads", 2))
    if options["device"].startswith("cuda"):
        torch.set_float32_matmul_precision("high")
    {"correctness": correctness, "update": update, "act": act}[kind](options)


if __name__ == "__main__":
    main()
