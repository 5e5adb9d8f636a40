"""Seconds per update and per action of R2-Dreamer's authors' PyTorch DreamerV3, in a Python of its own.

python benchmarks/r2dreamer_reference.py CHECKOUT OPTIONS: CHECKOUT holds NM512/r2dreamer, OPTIONS are JSON. That Python
needs torch, tensordict (0.12.4 goes with torch 2.11), tensorboard and PyYAML. The agent is theirs with the rep_loss of
the option "representation" (dreamer without it: the variant with a decoder), from their YAML files. Their sizes from
12M to 400M have the same deter, hidden, units, discrete (our classes) and depth as ours; size1m, which they lack, is
their size12M with these five numbers of the published table. Their update always trains in float16; the precision asked
for takes its place here, their gradient scaler stays. An action includes moving the observations to the device and the
actions back, as their trainer does, and runs uncompiled in float32, as there.

Prints seconds as JSON, the last line being the whole: {"update": [...], "act_1": [...], "act_16": [...]}, "update" with
their torch.compile unless the option "compile" is false (its default is true on CUDA only). With it there is
"update_eager" too, unless the option "eager" is false. With the option "count" it gives the operations of one call in
place of seconds. With the option "lock" (a file) calls are timed while holding
it, so that several references may warm up at once. Imports nothing of WorldLoom.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

SHAPES = {"walker": {"height": (1,), "orientations": (14,), "velocity": (9,)}, "image": {"image": (64, 64, 3)}}
CONFIGS = {"walker": "dmc_proprio", "image": "dmc_vision"}  # of theirs, by observations
ACTIONS = 6
SIZE1M = {"deter": 512, "hidden": 64, "discrete": 4, "depth": 4, "units": 64}


class Settings(dict[str, Any]):
    """Their config object, as far as the agent reads it."""

    __setattr__ = dict.__setitem__

    def __getattr__(self, key: str) -> Any:
        if key not in self:
            raise AttributeError(key)
        return self[key]


def resolve(value: Any, root: dict[str, Any]) -> Any:
    """What Hydra does with their files: ${name.name} stands for another value; 3e-4 is a number."""
    if isinstance(value, dict):
        return Settings({name: resolve(one, root) for name, one in value.items()})
    if not isinstance(value, str):
        return value
    if found := re.fullmatch(r"\$\{([\w.]+)\}", value):
        other: Any = root
        for name in found[1].split("."):
            other = other[name]
        return resolve(other, root)
    return float(value) if re.fullmatch(r"\d+(\.\d+)?e[-+]?\d+", value) else value


def make_config(checkout: Path, options: dict[str, Any], compiled: bool) -> Settings:
    import yaml

    def load(name: str) -> dict[str, Any]:
        content: dict[str, Any] = yaml.safe_load((checkout / "configs" / f"{name}.yaml").read_text())
        content.pop("defaults", None)
        return content

    size = "12M" if options["size"] == "size1m" else options["size"].removeprefix("size").upper()
    model = load("model/_base_") | load(f"model/size{size}") | (SIZE1M if options["size"] == "size1m" else {})
    model |= {"rep_loss": options.get("representation", "dreamer"), "compile": compiled}
    root = {"device": options["device"], "env": load(f"env/{CONFIGS[options['obs']]}"), "model": model}
    config: Settings = resolve(model, root)
    return config


def make_agent(checkout: Path, options: dict[str, Any], compiled: bool) -> Any:
    import dreamer

    dtype = getattr(torch, options["precision"])
    dreamer.autocast = lambda device_type, **_: torch.autocast(device_type, dtype, dtype != torch.float32)
    spaces = {name: SimpleNamespace(shape=shape) for name, shape in SHAPES[options["obs"]].items()}
    config = make_config(checkout, options, compiled)
    agent = dreamer.Dreamer(config, SimpleNamespace(spaces=spaces), SimpleNamespace(shape=(ACTIONS,)))
    return agent.to(options["device"])


def random_rows(options: dict[str, Any], *lead: int) -> dict[str, torch.Tensor]:
    """Numbers as their environments give them; every row but the images has one dimension after the leading ones."""
    rows: dict[str, torch.Tensor] = {}
    for name, shape in SHAPES[options["obs"]].items():
        image = len(shape) == 3
        rows[name] = torch.randint(256, (*lead, *shape), dtype=torch.uint8) if image else torch.randn(*lead, *shape)
    flags = {name: torch.zeros(*lead, 1, dtype=torch.bool) for name in ("is_first", "is_last", "is_terminal")}
    return {**rows, **flags, "reward": torch.randn(*lead, 1)}


class RandomBuffer:
    """Their buffer's two methods: the same batch each time, an episode starting in the middle of each window."""

    def __init__(self, agent: Any, options: dict[str, Any]) -> None:
        from tensordict import TensorDict

        lead = (options["batch"], options["length"])
        rows = random_rows(options, *lead)
        rows["is_first"][:, lead[1] // 2] = True
        rows["is_last"][:, lead[1] // 2 - 1] = True
        rows["action"] = torch.rand(*lead, ACTIONS) * 2 - 1
        self.data = TensorDict(rows, batch_size=lead).to(options["device"])
        state = agent.get_initial_state(lead[0])
        self.initial = (state["stoch"], state["deter"])

    def sample(self) -> tuple[Any, None, tuple[torch.Tensor, torch.Tensor]]:
        return self.data.clone(recurse=False), None, self.initial

    def update(self, index: None, stoch: torch.Tensor, deter: torch.Tensor) -> None:
        """Writing latents back belongs to replay."""


def timed(name: str, call: Callable[[], Any], options: dict[str, Any]) -> list[float]:
    from counting import Counted
    from turns import turn

    def once() -> float:
        begun = time.perf_counter()
        call()
        if options["device"].startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    warmup = [once() for _ in range(options["warmup"])]
    print(f"{name}: {options['warmup']} warm-up calls in {sum(warmup):.1f} s", flush=True)
    if options.get("count"):
        with Counted() as counted:
            call()
        return [float(counted.calls.total())]
    with turn(options):
        return [once() for _ in range(options["repeats"])]


def act_seconds(agent: Any, environments: int, options: dict[str, Any]) -> list[float]:
    from tensordict import TensorDict

    seen = TensorDict(random_rows(options, environments), batch_size=(environments,))
    if options["device"].startswith("cuda"):
        seen = seen.pin_memory()
    state = agent.get_initial_state(environments)

    def act() -> None:
        nonlocal state
        action, state = agent.act(seen.to(options["device"], non_blocking=True).clone(), state)
        action.cpu()

    return timed(f"act_{environments}", act, options)


def main() -> None:
    checkout, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    sys.path.insert(0, str(checkout))
    torch.set_num_threads(options["threads"])
    torch.set_float32_matmul_precision("high")  # as their train.py
    compiled = options.get("compile", options["device"].startswith("cuda"))
    found: dict[str, list[float]] = {}

    def updates(name: str, agent: Any) -> None:
        buffer = RandomBuffer(agent, options)
        found[name] = timed(name, lambda: agent.update(buffer), options)

    agent = make_agent(checkout, options, False)
    for environments in (1, 16):
        found[f"act_{environments}"] = act_seconds(agent, environments, options)
    if not compiled or options.get("eager", True):
        updates("update_eager" if compiled else "update", agent)
    del agent
    if compiled:
        print(json.dumps(found), flush=True)  # compiling takes minutes: what is known by then
        updates("update", make_agent(checkout, options, True))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
