"""The training command: python -m launch.train --config configs/tdmpc2_pendulum.yaml [--section.key value …]"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.starting import say_what_starts

if __name__ == "__main__":
    say_what_starts("training", sys.argv[1:])  # before the imports below, which take seconds

from launch.arguments import Parser, dump_config, run_config, run_parser
from launch.claim import HEARTBEAT, LOCK, Claim
from launch.earlier import RESUME, Asked, changes, check_unused, is_complete, read_asked, saved_config
from launch.failures import keep_traceback, sentence
from launch.places import in_ray_job, run_place
from worldloom.command import COMMAND
from worldloom.envs import EnvironmentFailed
from worldloom.files import CheckpointError
from worldloom.locations import is_remote, locate, read_bytes, remove_file, write_bytes
from worldloom.manifest import checkpoint_folders
from worldloom.runs.agent_state import AgentSnapshot
from worldloom.runs.build import check_config, probe_env
from worldloom.runs.config import RunConfig
from worldloom.runs.home import Home, open_home
from worldloom.runs.lease import InUse
from worldloom.runs.start import FOLDER, keep_network, place_start, read_start, with_network_of


def main(argv: list[str] | None = None) -> int:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # Ray may be started with it blocked, to outlive it
    argv = spelled_out(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = command_parser()
    try:
        asked = read_asked(argv)
        saved = saved_config(asked)
        config, before = _configs(parser, argv, saved)
        config, start = (config, None) if before else _begin_from(parser, config)
        run = asked.place(_default_name(config))
        changed = changes(before, config) if before else []
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if in_ray_job() or is_remote(run):
        print(f"run directory: {run}", flush=True)
    if asked.resume == "auto" and saved and is_complete(run, config):
        print(f"{run} is complete: nothing is left to do. Raise --train.total_steps to go on with it.")
        return 0
    with contextlib.ExitStack() as held:
        try:
            check_config(config)
            home = _take(held, run, asked, saved is not None)
        except (ValueError, TypeError, OSError) as error:
            parser.refuse(sentence(error))
        for change in changed:
            print(f"differs from the run so far: {change}", flush=True)
        return _run(config, home, saved is not None, start)


def spelled_out(argv: Sequence[str]) -> list[str]:
    """Return the arguments with the short names of options replaced by the fields that they stand for."""
    words = [word.partition("=") for word in argv]
    return [SHORT.get(name, name) + equals + value for name, equals, value in words]


def _begin_from(parser: Parser, config: RunConfig) -> tuple[RunConfig, AgentSnapshot | None]:
    """Return the config with the network of the agent that a new run starts from, and that agent; None without one."""
    if config.start.checkpoint is None:
        return config, None
    try:
        start = read_start(_with_start_found(config), probe_env(config))
        config = with_network_of(config, start.description, config.start.checkpoint)
    except (ValueError, TypeError, OSError, CheckpointError, EnvironmentFailed) as error:
        parser.refuse(sentence(error))
    print(f"starting from {config.start.checkpoint}: {config.algorithm}", flush=True)
    return config, start


def _with_start_found(config: RunConfig) -> RunConfig:
    """Return the config with start.checkpoint as a place: as for --run-dir, it may be a name in the storage."""
    given = str(config.start.checkpoint)
    place = locate(given)
    if not is_remote(place) and not place.exists():
        place = run_place(given, config.storage)
    return replace(config, start=replace(config.start, checkpoint=str(place)))


def _configs(parser: Parser, argv: list[str], saved: Path | None) -> tuple[RunConfig, RunConfig | None]:
    """Return the config of this run and, if it goes on with an earlier one, the config saved there, which holds for
    what the arguments leave out."""
    if saved is None:
        return run_config(parser, parser.parse_args(argv)), None
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:  # the saved one may lie at a URL
        file.write(read_bytes(saved))
        file.flush()
        before = run_config(parser, parser.parse_args(["--config", file.name]))
        new = run_config(parser, parser.parse_args(["--config", file.name, *argv]))
        return keep_network(before, new), before


def _take(held: contextlib.ExitStack, run: Path, asked: Asked, resume: bool) -> Home:
    """Claim the run for this process, until the end of `held`. With auto, wait for a process that is about to end, as
    the driver of a lost cluster is for a minute. Raises ValueError if the run is in use, or not as asked."""
    fresh = is_remote(run) or not run.exists()
    deadline = time.monotonic() + (END_SECONDS if asked.resume == "auto" else 0.0)
    while True:
        try:
            with contextlib.ExitStack() as claims:
                home = claims.enter_context(open_home(run))
                home.dir.mkdir(parents=True, exist_ok=True)
                go_on = f"Go on from the last checkpoint with:\n  {_resume_command(run)}"
                claims.enter_context(Claim(home.dir, go_on, anyway=is_remote(run)))
                held.push(claims.pop_all())
            break
        except InUse as error:
            if time.monotonic() > deadline:
                raise
            print(f"{error} Waiting, since --resume is auto …", flush=True)
            time.sleep(RETRY_SECONDS)
    if fresh:
        held.callback(_remove_empty_run_dir, home.dir)
    if not resume:
        check_unused(home, asked.resume)
    return home


def _run(config: RunConfig, home: Home, resume: bool, start: AgentSnapshot | None) -> int:
    path, saved = home.dir / "config.yaml", checkpoint_folders(home.root)
    before, logged = path.read_bytes() if resume else None, _logged(home.dir)
    try:
        for place in {home.root, home.dir}:  # of a URL, the second holds copies
            remove_file(place / ERROR)
        summary = _train(config, home, resume, start)
    except KeyboardInterrupt:
        go_on = f"go on from the last checkpoint with:\n  {_resume_command(home.root)}"
        print(f"\nstopped at once; {go_on if checkpoint_folders(home.root) else 'nothing was saved yet'}")
        return 130
    except Exception as error:
        if before is not None and _same_checkpoints(home, saved):  # they belong to the earlier config
            write_bytes(path, before)
        more = _more(error, home, refused=_logged(home.dir) == logged)
        if not isinstance(error, EXPECTED):
            raise
        if isinstance(error, EnvironmentFailed) and error.__cause__:
            traceback.print_exception(error.__cause__)  # it shows the place in the user's code
        print(f"launch.train: {sentence(error)}\n{more}".rstrip(), file=sys.stderr)
        return 1
    return _conclude(summary, home)


def _more(error: Exception, home: Home, refused: bool) -> str:
    """Return where the traceback is and how to go on; nothing if the run was refused before it did anything."""
    if refused and isinstance(error, REFUSALS):
        return ""
    more = f"The traceback is in {home.root / ERROR}.\n" if keep_traceback(error, home.dir / ERROR) else ""
    with contextlib.suppress(OSError):  # the store does not answer
        command = _resume_command(home.root)
        if checkpoint_folders(home.root) and command not in str(error):
            more += f"Go on from the last checkpoint with:\n  {command}\n"
    return more


def _same_checkpoints(home: Home, saved: list[Path]) -> bool:
    with contextlib.suppress(OSError):  # the store does not answer
        return checkpoint_folders(home.root) == saved
    return False


def command_parser() -> Parser:
    """Return the parser of the command's options."""
    parser = run_parser("launch.train", "Train an agent, with Ray or in this process (--runtime.kind inline).")
    parser.add_argument("--run-dir", dest="run_dir", type=str, default=None, help=RUN_DIR_HELP)
    parser.add_argument("--name", type=str, default=None, help=NAME_HELP)
    parser.add_argument("--from", dest="from_checkpoint", type=str, default=None, help=FROM_HELP)
    parser.add_argument("--like", type=str, default=None, help=LIKE_HELP)
    parser.add_argument("--resume", nargs="?", const="always", choices=RESUME, default=None, help=RESUME_HELP)
    return parser


def _default_name(config: RunConfig) -> str:
    name = f"{config.env.id}-{config.algorithm}".replace(":", "-").replace("/", "-")
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _remove_empty_run_dir(run_dir: Path) -> None:
    """Remove the directory of a run that ended before it logged any metrics."""
    if all(path.name in LEFTOVERS for path in run_dir.iterdir()) and not _logged(run_dir):
        shutil.rmtree(run_dir, ignore_errors=True)


def _logged(run_dir: Path) -> int:
    """Return how many bytes of metrics there are."""
    metrics = run_dir / "metrics.jsonl"
    return metrics.stat().st_size if metrics.exists() else 0


def _train(config: RunConfig, home: Home, resume: bool, start: AgentSnapshot | None) -> dict[str, Any]:
    """Train and return the summary. Writes config.yaml once everything has started and, on a resume, is restored."""
    text, config = dump_config(config), place_start(config, home.root, start)
    if config.runtime.kind == "inline":
        from worldloom.runs.inline import InlineTrainer

        trainer = InlineTrainer(config, home, resume)
        trainer.run.write_config(text)
        return trainer.train()
    from distributed.coordinator import train

    return train(config, home, resume, lambda run: run.write_config(text))


def _results(home: Home) -> Path:
    """Return the file with the results: report.html or, if it could not be written, summary.json."""
    return home.root / ("report.html" if (home.dir / "report.html").is_file() else "summary.json")


def _resume_command(run: Path) -> str:
    command = "worldloom train" if COMMAND in os.environ else "python -m launch.train"
    return f"{command} --resume --run-dir {run}"


def _conclude(summary: dict[str, Any], home: Home) -> int:
    if summary["status"] == "interrupted":
        print(f"\nsaved at step {summary['env_steps']:,}; go on with:\n  {_resume_command(home.root)}")
        return 130
    if summary["status"] == "unsaved":
        print(f"\nlaunch.train: the last checkpoint could not be written; see above. Earlier ones are in {home.root}.")
        return 1
    print(
        f"\n{summary['algorithm']} on {summary['env_id']}: return {summary['eval_return_mean']:.1f} ± "
        f"{summary['eval_return_std']:.1f} over {summary['eval_episodes']} episodes after {summary['env_steps']:,} "
        f"steps in {summary['wall_seconds'] / 60:.1f} minutes\n{_results(home)}"
    )
    return 0


SHORT = {"--runtime": "--runtime.kind", "--from": "--start.checkpoint", "--like": "--start.like"}
RUN_DIR_HELP = "folder or URL of the run, instead of its --name in the storage"
NAME_HELP = "name of the run, its folder in the storage; default: ENV-ALGORITHM-TIME"
FROM_HELP = (
    "fine-tune: start from the weights of a run (or its name in the storage), a model directory or a published file"
)
LIKE_HELP = "with --from a multi-task file: the task whose embedding the new task starts from (start.like)"
RESUME_HELP = (
    "go on with the run of --name or --run-dir, replay included; auto: begin it if it does not exist (the default in a "
    "Ray job); never: refuse if it exists (the default elsewhere)"
)
ERROR = "error.txt"
# Written before the first line of metrics.
LEFTOVERS = (LOCK, HEARTBEAT, "config.yaml", "metrics.jsonl", "ray.log", "tensorboard", FOLDER)
END_SECONDS, RETRY_SECONDS = 180.0, 10.0  # of waiting for the end of another process, and between two looks
EXPECTED = (ValueError, TypeError, OSError, MemoryError, RuntimeError, FloatingPointError, ModuleNotFoundError)
REFUSALS = (ValueError, TypeError, OSError, MemoryError, ModuleNotFoundError, EnvironmentFailed, CheckpointError)

if __name__ == "__main__":
    sys.exit(main())
