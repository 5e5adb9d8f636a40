"""Trains TD-MPC2 with its authors' code on a CPU, run by `benchmarks.beside --tdmpc2`, in a Python of its own.

python benchmarks/tdmpc2_training.py CHECKOUT OPTIONS: CHECKOUT holds nicklashansen/tdmpc2, OPTIONS are JSON: task (by
their name), size, steps (agent steps), seed, threads, out (a file for the returns), more (further fields of their
config.yaml). That Python needs torch, torchrl and tensordict (0.8 as they pin them, 0.12 with torch 2.13), gymnasium
0.29 (their wrappers do not fit later ones), dm-control, pandas and termcolor.

Their environment, buffer, agent and trainer run from a copy in which "cuda:0" is the CPU; they compile nothing there,
and do not evaluate. Writes a line "steps,return" as each training episode ends. Imports nothing of WorldLoom.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("MUJOCO_GL", "disable")  # before dm_control is imported: nothing is drawn
os.environ["LAZY_LEGACY_OP"] = "0"  # as their train.py

import torch
import yaml
from tdmpc2_reference import Settings, copy_for

MISSING = "???"  # what their config.yaml leaves open
NEVER = 10**12  # steps between two evaluations


def number(value: Any) -> Any:
    """Return numbers for words: YAML 1.1, as PyYAML reads it, takes 3e-4 for a word."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def make_settings(checkout: Path, options: dict[str, Any]) -> Settings:
    """Return their config.yaml, and what their parser adds for one task."""
    from common import MODEL_SIZE

    file = yaml.safe_load((checkout / "tdmpc2" / "config.yaml").read_text())
    fields = {name: number(value) for name, value in file.items() if value != MISSING and name != "defaults"}
    fields |= MODEL_SIZE[options["size"]]
    fields |= {"task": options["task"], "tasks": [options["task"]], "multitask": False, "task_dim": 0}
    fields |= {"task_title": options["task"], "work_dir": Path(tempfile.mkdtemp())}
    fields |= {"steps": options["steps"], "seed": options["seed"], "eval_freq": NEVER, "eval_episodes": 0}
    fields |= {"compile": False, "enable_wandb": False, "save_csv": False, "save_agent": False, "save_video": False}
    fields |= options["more"]
    fields["bin_size"] = (fields["vmax"] - fields["vmin"]) / (fields["num_bins"] - 1)
    return Settings(**fields)


def main() -> None:
    checkout, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(options["threads"])
    torch.cuda.mem_get_info = lambda *_: (0, 0)  # there is no GPU memory for the buffer
    sys.path.insert(0, str(copy_for("cpu", options["size"], checkout, environments=True)))
    from common.buffer import Buffer
    from common.logger import Logger
    from common.seed import set_seed
    from envs import make_env
    from tdmpc2 import TDMPC2
    from trainer.online_trainer import OnlineTrainer

    class Noting(Logger):  # type: ignore[misc]
        """Their logger, which also writes the return of each training episode."""

        def log(self, found: dict[str, Any], category: str = "train") -> None:
            super().log(found, category)
            if category == "train":
                with Path(options["out"]).open("a") as file:
                    file.write(f"{found['step']},{float(found['episode_reward'])}\n")

    settings = make_settings(checkout, options)
    set_seed(settings.seed)
    env = make_env(settings)
    OnlineTrainer(
        cfg=settings, env=env, agent=TDMPC2(settings), buffer=Buffer(settings), logger=Noting(settings)
    ).train()


if __name__ == "__main__":
    main()
