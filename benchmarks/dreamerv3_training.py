"""Trains DreamerV3 with its authors' code on a CPU, run by `benchmarks.beside --dreamerv3`, in a Python of its own.

python benchmarks/dreamerv3_training.py CHECKOUT OPTIONS: CHECKOUT holds danijar/dreamerv3, OPTIONS are JSON: threads,
out (a file for the returns), logdir, repeat (frames of an agent step), flags (words for their command). That Python
needs jax 0.4.33, what else `dreamerv3_reference.py` names, and dm_control.

Their command runs as it is, but for one thing: the picture of each step, which their environment makes for the log even
where the agent sees none, stays black. Writes a line "steps,return" for each training episode, agent steps, in the end.
Imports nothing of WorldLoom.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

options = json.loads(sys.argv[2])
os.environ.setdefault("MUJOCO_GL", "disable")  # before dm_control is imported: nothing is drawn
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (  # before jax is
    "--xla_cpu_multi_thread_eigen=" + ("true" if options["threads"] > 1 else "false")
    + f" intra_op_parallelism_threads={options['threads']}"
)  # fmt: skip


def main() -> None:
    checkout = Path(sys.argv[1])
    sys.path.insert(0, str(checkout))
    from dm_control import mujoco
    from dreamerv3.main import main as train

    def draw_nothing(_: Any, height: int, width: int, camera_id: int) -> Any:
        assert camera_id >= 0
        return np.zeros((height, width, 3), np.uint8)

    mujoco.Physics.render = draw_nothing
    train(["--logdir", options["logdir"], *options["flags"]])
    scores = [json.loads(line) for line in (Path(options["logdir"]) / "scores.jsonl").read_text().splitlines()]
    lines = [f"{score['step'] // options['repeat']},{score['episode/score']}\n" for score in scores]
    Path(options["out"]).write_text("".join(lines))


if __name__ == "__main__":
    main()
