"""Seconds per update or plan of TD-MPC2's authors' code, run by the benchmarks' --reference, in a Python of its own.

python benchmarks/tdmpc2_reference.py CHECKOUT OPTIONS: CHECKOUT holds nicklashansen/tdmpc2, OPTIONS are JSON. That
Python needs torch and tensordict 0.8.3. The code runs from a copy in which "cuda:0" is the device asked for. Prints the
seconds of each update and each plan as JSON in the last line. Imports nothing of WorldLoom.
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


def copy_for(device: str, checkout: Path) -> Path:
    """The checkout's code with another device in it; Adam's capturable form exists on CUDA only."""
    folder = Path(tempfile.mkdtemp()) / "tdmpc2"
    shutil.copytree(checkout / "tdmpc2", folder, ignore=shutil.ignore_patterns("envs"))
    for path in folder.rglob("*.py"):
        text = path.read_text().replace("cuda:0", device)
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
        "tasks": ["one"], "batch_size": options["batch"], "compile": options["device"].startswith("cuda"),
        "episode_length": EPISODE_LENGTH, "action_dim": ACTIONS, "obs_shape": {"state": (OBS,)},
    }  # fmt: skip
    return Settings(**published | MODEL_SIZE[options["size"]])


def timed(call: Any, options: dict[str, Any]) -> list[float]:
    seconds = []
    for _ in range(options["warmup"] + options["repeats"]):
        begun = time.perf_counter()
        call()
        if options["device"].startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return seconds[options["warmup"] :]


def main() -> None:
    checkout, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(options["threads"])
    sys.path.insert(0, str(copy_for(options["device"], checkout)))
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
    obs, steps = torch.randn(OBS), iter(range(10**9))
    found = {
        "plan": timed(lambda: agent.act(obs, t0=next(steps) == 0), options),
        "update": timed(lambda: agent.update(SimpleNamespace(sample=lambda: batch)), options),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
