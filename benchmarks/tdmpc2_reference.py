"""Seconds per update or plan of TD-MPC2's authors' code, run by the benchmarks' --reference, in a Python of its own.

python benchmarks/tdmpc2_reference.py CHECKOUT OPTIONS: CHECKOUT holds nicklashansen/tdmpc2, OPTIONS are JSON. That
Python needs torch and tensordict: 0.8.3 as they pin it, 0.12.4 with torch 2.11 (0.15 breaks their code). Prints the
seconds of each update and plan as JSON, the last line being the whole. On CUDA their settings hold: compiled, and
float32 products in TensorFloat-32. Options beside the usual: "compile" (a flag), "calls" (some of "plan", "update"),
"count" (gives the operations of one call in place of seconds), and "lock" (a file; calls are timed while holding it, so
that several references may warm up at once).

The code runs from a copy in which "cuda:0" is the device asked for. Where there are but two critics (size 1), the copy
draws their order another way: torch 2.11 cannot compile randperm(2)[:2]. Imports nothing of WorldLoom.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

OBS, ACTIONS, EPISODE_LENGTH = 39, 4, 500


class Settings(SimpleNamespace):
    """Their config object, as far as the agent reads it."""

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key, default)


def copy_for(device: str, size: int, checkout: Path, environments: bool = False) -> Path:
    """The checkout's code with another device in it; Adam's capturable form exists on CUDA only."""
    folder = Path(tempfile.mkdtemp()) / "tdmpc2"
    draw = "torch.randperm(self.cfg.num_q, device=out.device)"
    ignored = None if environments else shutil.ignore_patterns("envs")
    shutil.copytree(checkout / "tdmpc2", folder, ignore=ignored)
    for path in folder.rglob("*.py"):
        text = path.read_text().replace("cuda:0", device)
        if size == 1:
            text = text.replace(draw, "torch.rand(self.cfg.num_q, device=out.device).argsort()")
        path.write_text(text if device.startswith("cuda") else text.replace("capturable=True", "capturable=False"))
    return folder


def make_settings(options: dict[str, Any]) -> Settings:
    from common import MODEL_SIZE

    published = {
        "num_bins": 101, "vmin": -10, "vmax": 10, "bin_size": 0.2, "log_std_min": -10, "log_std_max": 2,
        "dropout": 0.01, "simnorm_dim": 8, "num_channels": 32, "num_enc_layers": 2, "enc_dim": 256, "mlp_dim": 512,
        "latent_dim": 512, "num_q": 5, "task_dim": 0, "episodic": False, "multitask": False, "obs": "state",
        "horizon": 3, "rho": 0.5, "tau": 0.01, "lr": 3e-4, "enc_lr_scale": 0.3, "grad_clip_norm": 20,
        "entropy_coef": 1e-4, "reward_coef": 0.1, "value_coef": 0.1, "consistency_coef": 20, "termination_coef": 1,
        "discount_denom": 5, "discount_min": 0.95, "discount_max": 0.995, "mpc": True, "iterations": 6,
        "num_samples": 512, "num_elites": 64, "num_pi_trajs": 24, "min_std": 0.05, "max_std": 2, "temperature": 0.5,
        "tasks": ["one"], "batch_size": options["batch"], "compile": options["compile"],
        "episode_length": EPISODE_LENGTH, "action_dim": ACTIONS, "obs_shape": {"state": (OBS,)},
    }  # fmt: skip
    return Settings(**published | MODEL_SIZE[options["size"]])


def timed(name: str, call: Any, options: dict[str, Any]) -> list[float]:
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


def main() -> None:
    checkout, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    cuda = options["device"].startswith("cuda")
    options = {"compile": cuda, "calls": ["plan", "update"]} | options
    torch.set_num_threads(options["threads"])
    if cuda:  # as their train.py
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    sys.path.insert(0, str(copy_for(options["device"], options["size"], checkout)))
    from tdmpc2 import TDMPC2

    agent = TDMPC2(make_settings(options))
    rows, device = (3, options["batch"]), options["device"]
    batch = (
        torch.randn(4, options["batch"], OBS, device=device),
        torch.rand(*rows, ACTIONS, device=device) * 2 - 1,
        torch.randn(*rows, 1, device=device),
        torch.zeros(*rows, 1, device=device),
        None,
    )
    obs, found = torch.randn(OBS), {}
    calls = {  # t0 stays false: true would be compiled apart, and costs the same
        "plan": lambda: agent.act(obs, t0=False),
        "update": lambda: agent.update(SimpleNamespace(sample=lambda: batch)),
    }
    for name in options["calls"]:
        found[name] = timed(name, calls[name], options)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
