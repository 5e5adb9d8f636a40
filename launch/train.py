"""The training command: python -m launch.train --config configs/tdmpc2_pendulum.yaml [--section.key value …]"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from launch.starting import say_what_starts

if __name__ == "__main__":
    say_what_starts("training", sys.argv[1:])  # before the imports below, which take seconds

from launch.arguments import Parser, dump_config, run_config, run_parser
from launch.claim import HEARTBEAT, LOCK, Claim
from launch.failures import sentence
from launch.runs import run_directory, runs_folder
from worldloom.command import COMMAND
from worldloom.envs import EnvironmentFailed
from worldloom.files import write_text
from worldloom.runs.build import check_config
from worldloom.runs.config import RunConfig


def main(argv: list[str] | None = None) -> int:
    argv = [SHORT.get(word, word) for word in (sys.argv[1:] if argv is None else argv)]
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = command_parser()
    try:
        parsed = parser.parse_args(_with_saved_config(argv))
        config = run_config(parser, parsed)
        given = Path(parsed.run_dir) if parsed.run_dir else _default_run_dir(config)
        run_dir = run_directory(given)
    except ValueError as error:
        parser.error(str(error))
    if run_dir != given:
        print(f"run directory: {run_dir} (of a Ray job: relative run directories lie in {runs_folder()})", flush=True)
    fresh = not run_dir.exists()
    with contextlib.ExitStack() as held:
        try:
            check_config(config)
            run_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(Claim(run_dir, f"Go on from the last checkpoint with:\n  {_resume_command(run_dir)}"))
            if fresh:
                held.callback(_remove_empty_run_dir, run_dir)
            if not parsed.resume:
                _check_unused(run_dir)
        except (ValueError, TypeError, OSError) as error:
            parser.refuse(sentence(error))
        return _run(config, run_dir, parsed.resume)


def _run(config: RunConfig, run_dir: Path, resume: bool) -> int:
    path, saved = run_dir / "config.yaml", _checkpoints(run_dir)
    before = path.read_text() if resume else None
    try:
        summary = _train(config, run_dir, resume)
    except KeyboardInterrupt:
        go_on = f"go on from the last checkpoint with:\n  {_resume_command(run_dir)}"
        print(f"\nstopped at once; {go_on if _checkpoints(run_dir) else 'nothing was saved yet'}")
        return 130
    except Exception as error:
        if before is not None and _checkpoints(run_dir) == saved:  # they belong to the earlier config
            write_text(path, before)
        if not isinstance(error, EXPECTED):
            raise
        if isinstance(error, EnvironmentFailed) and error.__cause__:
            traceback.print_exception(error.__cause__)  # it shows the place in the user's code
        print(f"launch.train: {sentence(error)}", file=sys.stderr)
        return 1
    return _conclude(summary, run_dir)


def command_parser() -> Parser:
    """Return the parser of the command's options."""
    parser = run_parser("launch.train", "Train an agent, with Ray or in this process (--runtime.kind inline).")
    parser.add_argument("--run-dir", dest="run_dir", type=str, default=None, help=RUN_DIR_HELP)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir, including its replay")
    return parser


def _with_saved_config(argv: list[str]) -> list[str]:
    """Return `argv`; if it resumes a run, the run's saved config comes before the other arguments."""
    if "--resume" not in argv:
        return argv
    given = next((a.partition("=")[2] or argv[i + 1] for i, a in enumerate(argv) if a.startswith("--run-dir")), None)
    run_dir = None if given is None else run_directory(given)
    if run_dir is None or not (saved := run_dir / "config.yaml").is_file():
        found = "none was given" if run_dir is None else f"{run_dir} holds no config.yaml"
        sys.exit(f"launch.train: --resume needs the --run-dir of an earlier run, but {found}.")
    return ["--config", str(saved), *argv]


def _default_run_dir(config: RunConfig) -> Path:
    name = f"{config.env.id}-{config.algorithm}".replace(":", "-").replace("/", "-")
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _check_unused(run_dir: Path) -> None:
    metrics = run_dir / "metrics.jsonl"
    if (run_dir / "checkpoints").exists() or (metrics.exists() and metrics.stat().st_size):
        raise ValueError(f"{run_dir} already holds a run. Go on with it by --resume, or choose another --run-dir.")


def _remove_empty_run_dir(run_dir: Path) -> None:
    """Remove the directory of a run that ended before it logged any metrics."""
    metrics = run_dir / "metrics.jsonl"
    if all(path.name in LEFTOVERS for path in run_dir.iterdir()) and not (metrics.exists() and metrics.stat().st_size):
        shutil.rmtree(run_dir, ignore_errors=True)


def _checkpoints(run_dir: Path) -> set[Path]:
    return set(run_dir.glob("checkpoints/step-*/manifest.json"))


def _train(config: RunConfig, run_dir: Path, resume: bool) -> dict[str, Any]:
    """Train and return the summary. Writes config.yaml once everything has started and, on a resume, is restored."""
    text = dump_config(config)
    if config.runtime.kind == "inline":
        from worldloom.runs.inline import InlineTrainer

        trainer = InlineTrainer(config, run_dir, resume)
        trainer.run.write_config(text)
        return trainer.train()
    from distributed.coordinator import train

    return train(config, run_dir, resume, lambda run: run.write_config(text))


def _results(run_dir: Path) -> Path:
    """Return the file with the results: report.html or, if it could not be written, summary.json."""
    page = run_dir / "report.html"
    return page if page.is_file() else run_dir / "summary.json"


def _resume_command(run_dir: Path) -> str:
    command = "worldloom train" if COMMAND in os.environ else "python -m launch.train"
    return f"{command} --resume --run-dir {run_dir}"


def _conclude(summary: dict[str, Any], run_dir: Path) -> int:
    if summary["status"] == "interrupted":
        print(f"\nsaved at step {summary['env_steps']:,}; go on with:\n  {_resume_command(run_dir)}")
        return 130
    if summary["status"] == "unsaved":
        print(f"\nlaunch.train: the last checkpoint could not be written; see above. Earlier ones are in {run_dir}.")
        return 1
    print(
        f"\n{summary['algorithm']} on {summary['env_id']}: return {summary['eval_return_mean']:.1f} ± "
        f"{summary['eval_return_std']:.1f} over {summary['eval_episodes']} episodes after {summary['env_steps']:,} "
        f"steps in {summary['wall_seconds'] / 60:.1f} minutes\n{_results(run_dir)}"
    )
    return 0


SHORT = {
    "--runtime": "--runtime.kind",
    "--runtime=inline": "--runtime.kind=inline",
    "--runtime=ray": "--runtime.kind=ray",
}
RUN_DIR_HELP = (
    "directory of the run; default: runs/ENV-ALGORITHM-TIME; in a Ray job, relative directories lie in "
    "~/worldloom/runs, or in $WORLDLOOM_RUNS if that is set"
)
LEFTOVERS = (
    LOCK,
    HEARTBEAT,
    "config.yaml",
    "metrics.jsonl",
    "ray.log",
    "tensorboard",
)  # written before the first line of metrics
EXPECTED = (ValueError, TypeError, OSError, MemoryError, RuntimeError, FloatingPointError, ModuleNotFoundError)

if __name__ == "__main__":
    sys.exit(main())
