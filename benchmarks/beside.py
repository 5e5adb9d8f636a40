"""Learning beside the authors' code: python -m benchmarks.beside --tdmpc2 DIR --python PYTHON, or --dreamerv3 DIR

Trains TD-MPC2 (size 1) or DreamerV3 (size1m) on a task of DeepMind Control from states with our code and with the
authors' (DIR holds nicklashansen/tdmpc2 or danijar/dreamerv3), with the same settings, one run after the other on the
same cores of this machine, and writes into the folder OUT: returns.csv, curves.svg and table.md. Theirs runs in a
Python of its own; tdmpc2_training.py and dreamerv3_training.py say what it needs. A run that is complete is kept when
the command is given again; one that was cut short starts anew. Returns are those of training episodes, with the noise
of exploration, for these cost nothing. Arguments that it does not know go to our configuration, not to theirs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.beside_page import AUTHORS, DONE, OURS, REPEAT, RETURNS, Settings, write
from benchmarks.calls import note_call
from launch.arguments import run_config, run_parser
from launch.sweeps.grid import values_of
from worldloom.replay.chunk import ChunkInfo
from worldloom.runs.build import probe_env
from worldloom.runs.config import RunConfig
from worldloom.runs.inline import InlineTrainer

PLACES = {"--tdmpc2": "DIR", "--dreamerv3": "DIR", "--python": "PYTHON", "--out": "OUT"}
ROOT = Path(__file__).resolve().parent.parent
LOG = "log.txt"


def tdmpc2_ours(_: Settings) -> list[str]:
    return ["--config", str(ROOT / "configs" / "tdmpc2_dmc.yaml"), "--algorithm", "tdmpc2:1m"]


def tdmpc2_theirs(settings: Settings, seed: int) -> dict[str, Any]:
    return {"task": settings.task, "size": 1, "steps": settings.steps, "seed": seed, "more": {}}


def dreamerv3_ours(settings: Settings) -> list[str]:
    fields = {
        "--algorithm": "dreamerv3:size1m",
        "--agent.batch_size": settings.batch,
        "--agent.batch_length": settings.length,
        "--env.num_envs": 1,
        "--train.train_ratio": settings.train_ratio,
        "--train.learning_starts": settings.batch * settings.length + settings.length,  # where theirs has its windows
        "--train.compile": "true",
    }
    preset = ["--config", str(ROOT / "configs" / "dreamerv3_dmc_proprio.yaml")]
    return [*preset, *(str(word) for pair in fields.items() for word in pair)]


def dreamerv3_theirs(settings: Settings, seed: int) -> dict[str, Any]:
    flags = {
        "--configs": "dmc_proprio",  # which is size1m
        "--task": "dmc_" + settings.task.replace("-", "_"),
        "--seed": seed,
        "--env.dmc.repeat": REPEAT,
        "--batch_size": settings.batch,
        "--batch_length": settings.length,
        "--report_length": settings.length,
        "--replay.size": "5e5",
        "--run.envs": 1,
        "--run.steps": settings.steps,
        "--run.train_ratio": settings.train_ratio,
        "--run.log_every": 30,
        "--run.report_every": "1e9",
        "--run.save_every": "1e9",
        "--run.usage.nvsmi": "False",
        "--jax.platform": "cpu",
        "--jax.compute_dtype": "float32",
        "--jax.prealloc": "False",
        "--logger.outputs": "jsonl",
    }
    words = [str(word) for pair in flags.items() for word in pair]
    return {"repeat": REPEAT, "flags": words}


@dataclass(frozen=True)
class Comparison:
    """Describes one algorithm: its name in the table, our arguments, the authors' program and its options."""

    name: str
    ours: Callable[[Settings], list[str]]
    program: str
    theirs: Callable[[Settings, int], dict[str, Any]]


COMPARISONS = {
    "tdmpc2": Comparison("TD-MPC2 1m", tdmpc2_ours, "tdmpc2_training.py", tdmpc2_theirs),
    "dreamerv3": Comparison("DreamerV3 size1m", dreamerv3_ours, "dreamerv3_training.py", dreamerv3_theirs),
}


def env_id(task: str) -> str:
    """Return DeepMind Control's id of a task by its authors' name, as in cartpole-balance-sparse."""
    domain, _, name = task.partition("-")
    return f"dm_control/{'ball_in_cup' if domain == 'cup' else domain}-{name.replace('-', '_')}-v0"


def our_config(what: Comparison, settings: Settings, seed: int, more: Sequence[str]) -> RunConfig:
    fields = {
        "--env.id": env_id(settings.task),
        "--train.total_steps": settings.steps,
        "--train.seed": seed,
        "--train.device": "cpu",
        "--runtime.kind": "inline",
        "--runtime.learner_threads": settings.threads,
        "--eval.interval": 0,
        "--eval.episodes": 1,
        "--checkpoint.interval": 0,
        "--log.to": "[]",
    }
    parser = run_parser("benchmarks.beside", "")
    words = [*what.ours(settings), *(str(word) for pair in fields.items() for word in pair), *more]
    return run_config(parser, parser.parse_args(words))


def train_ours(config: RunConfig, folder: Path) -> None:
    """Train in this process; note the return of each training episode."""
    trainer = InlineTrainer(config, folder / "run")
    recorder = trainer.run.recorder
    record = recorder.chunk

    def noting(info: ChunkInfo, newest_version: int) -> None:
        record(info, newest_version)
        with (folder / RETURNS).open("a") as file:
            file.writelines(f"{trainer.run.limiter.env_steps},{value}\n" for value in info.returns)

    recorder.chunk = noting  # type: ignore[method-assign]
    if trainer.train()["status"] != "completed":
        raise KeyboardInterrupt


def train_theirs(what: Comparison, settings: Settings, seed: int, folder: Path, o: argparse.Namespace) -> None:
    """Run the authors' code in its Python. Raises RuntimeError, with its last words, if it fails."""
    folder = folder.resolve()
    options = {"threads": settings.threads, "out": str(folder / RETURNS), "logdir": str(folder / "logdir")}
    options |= what.theirs(settings, seed)
    command = [o.python, str(ROOT / "benchmarks" / what.program), str(o.checkout.resolve()), json.dumps(options)]
    with (folder / LOG).open("w") as log:
        ended = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if ended:
        last = (folder / LOG).read_text().splitlines()[-12:]
        raise RuntimeError(f"the authors' code ended with {ended}; {folder / LOG} ends:\n" + "\n".join(last))


def refuse_other_settings(folder: Path, asked: dict[str, Any]) -> None:
    """End the program where a complete run had other settings than those asked for."""
    had = json.loads((folder / DONE).read_text())["settings"]
    if differ := sorted(name for name in asked if had[name] != asked[name]):
        told = ", ".join(f"{name} {had[name]} (asked for: {asked[name]})" for name in differ)
        sys.exit(f"{folder} is complete with {told}. Give these again, or another --out.")


def train_all(
    what: Comparison, settings: Settings, o: argparse.Namespace, argv: Sequence[str], more: Sequence[str]
) -> None:
    """Train every seed on both sides that is not complete; seeds first, so that both sides grow together."""
    asked = {**dataclasses.asdict(settings), "more": list(more)}
    configs = {seed: our_config(what, settings, seed, more) for seed in o.seeds}
    probe_env(configs[o.seeds[0]])  # a wrong task is refused before hours of the authors' training
    note_call(o.out, "benchmarks.beside", argv, PLACES)
    for seed in o.seeds:
        for side in (AUTHORS, OURS):
            folder = o.out / f"{side}-{seed}"
            if (folder / DONE).is_file():
                refuse_other_settings(folder, asked)
                continue
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            print(f"{side}, seed {seed}: training", flush=True)
            begun = time.monotonic()
            if side == OURS:
                train_ours(configs[seed], folder)
            else:
                train_theirs(what, settings, seed, folder, o)
            seconds = time.monotonic() - begun
            (folder / DONE).write_text(json.dumps({"seconds": round(seconds, 1), "settings": asked}) + "\n")
            print(f"{side}, seed {seed}: {seconds / 60:.1f} minutes", flush=True)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="benchmarks.beside", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    for family, repository in (("tdmpc2", "nicklashansen/tdmpc2"), ("dreamerv3", "danijar/dreamerv3")):
        which.add_argument(f"--{family}", type=Path, metavar="DIR", help=f"a checkout of {repository}")
    parser.add_argument("--python", default=sys.executable, help="the Python that runs the authors' code")
    parser.add_argument("--task", default="cartpole-swingup", help="of DeepMind Control, by the authors' name")
    parser.add_argument("--steps", type=int, default=10_000, help="agent steps of each run")
    parser.add_argument("--seeds", default="1,2", help="comma-separated, or 1..3")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each run")
    parser.add_argument("--train-ratio", type=float, default=512.0, help="DreamerV3's")
    parser.add_argument("--batch", type=int, default=16, help="DreamerV3's windows in a batch")
    parser.add_argument("--length", type=int, default=64, help="steps of each of DreamerV3's windows")
    parser.add_argument("--out", type=Path, help="folder; default: runs/beside-FAMILY-TASK")
    parser.add_argument("--table", action="store_true", help="train nothing: write what there is")
    o, more = parser.parse_known_args(argv)
    o.family = "tdmpc2" if o.tdmpc2 else "dreamerv3"
    o.checkout = o.tdmpc2 or o.dreamerv3
    if not o.table and not (o.checkout / o.family).is_dir():
        parser.error(f"{o.checkout} has no folder {o.family}, expected a checkout of the authors' repository.")
    try:
        o.seeds = [int(seed) for seed in values_of(o.seeds)]
    except ValueError:
        parser.error(f"--seeds is {o.seeds!r}, expected numbers such as 1,2,3 or 1..3.")
    if not o.table and shutil.which(o.python) is None:
        parser.error(f"--python is {o.python}, expected a Python that has what the authors' code needs.")
    o.out = o.out or Path("runs") / f"beside-{o.family}-{o.task}"
    return o, more


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is left, then write."""
    argv = sys.argv[1:] if argv is None else argv
    o, more = parse(argv)
    what = COMPARISONS[o.family]
    settings = Settings(o.task, o.steps, o.threads, o.train_ratio, o.batch, o.length)
    o.out.mkdir(parents=True, exist_ok=True)
    try:
        if not o.table:
            train_all(what, settings, o, argv, more)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"benchmarks.beside: {error}", file=sys.stderr)
        return 1
    finally:
        write(what.name, settings, o.out)
    print(f"\n{(o.out / 'table.md').read_text()}\n{o.out / 'table.md'}, returns.csv, curves.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
