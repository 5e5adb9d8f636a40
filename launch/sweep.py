"""Several runs at once: python -m launch.sweep --config FILE --env.id A,B --train.seed 0..4 [--agent.lr 1e-4,3e-4]"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import shlex
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.compare import default_page
from launch.failures import sentence
from launch.sweeps.folder import SweepFolder, is_finished, only_one
from launch.sweeps.plan import BASE, Plan, read_plan
from launch.sweeps.plan import sweep_parser as command_parser
from launch.sweeps.process import INTERRUPTED, OneRun
from launch.sweeps.search import SearchConfig, interrupt_search, run_search
from launch.sweeps.slots import Slots, slots
from launch.sweeps.table import REFRESH_SECONDS, SweepTable, last_line
from worldloom.interrupt import GracefulStop
from worldloom.report.compare import write_comparison
from worldloom.runs.config import RunConfig, RuntimeConfig

JOBS = 1  # at once, where their number is not given: each uses the whole cluster


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = command_parser()
    with contextlib.ExitStack() as held:
        try:
            plan = read_plan(parser, argv)
            held.enter_context(begun(plan))
        except (ValueError, TypeError, OSError) as error:
            parser.error(str(error))
        return carry_out(plan)


@contextlib.contextmanager
def begun(plan: Plan) -> Iterator[None]:
    """A context in which the plan's folder is this process's alone, and holds the files that runs begin with.

    Raises ValueError if the folder holds another sweep, or another process works in it.
    """
    with only_one(plan.folder.path):
        search = None if plan.search is None else dataclasses.asdict(plan.search)
        plan.folder.begin(plan.runs, search, plan.argv)
        yield


def carry_out(plan: Plan) -> int:
    """Run what is not finished; return the exit status."""
    try:
        return _run(plan)
    except KeyboardInterrupt:
        print(f"\nstopped at once; {_go_on(plan)}")
        return INTERRUPTED
    except (RuntimeError, OSError) as error:
        print(f"launch.sweep: {sentence(error)}", file=sys.stderr)
        return 1


def _run(plan: Plan) -> int:
    folder = plan.folder
    finished = [name for name in plan.runs if is_finished(folder.path / name)]
    done = f", of which {len(finished)} are finished already" if finished else ""
    print(f"sweep: {_what(plan)}{done}; in {folder.path}", flush=True)
    folder.try_again(plan.runs if plan.search is None else list(folder.errors))
    with GracefulStop() as stop:
        if plan.search is not None:
            _search(plan, plan.search, stop)
        elif unfinished := [name for name in plan.runs if name not in finished]:
            _grid(plan, unfinished, stop)
    return _conclude(plan, stop.requested)


def _what(plan: Plan) -> str:
    if plan.search is not None:
        return f"a search over {', '.join(plan.search.space)} with {plan.search.samples} samples"
    return f"{len(plan.runs)} runs"


@contextlib.contextmanager
def _cluster(plan: Plan, runs: int, stop: GracefulStop) -> Iterator[Slots]:
    """A context in which this process has joined or started Ray; it tells how many runs fit."""
    import ray

    from distributed.cluster import connect

    alone = RunConfig(runtime=RuntimeConfig(env_actors=0))  # a cluster of its own has a CPU for each of the machine's
    owns = connect(alone, f"worldloom-sweep-{secrets.token_hex(3)}", str(plan.folder.path))
    stop.take_back()
    try:
        has, devices = ray.cluster_resources(), {config.train.device for config in plan.runs.values()}
        found = slots(plan.parallel, runs, has.get("CPU", 1.0), 0.0 if devices == {"cpu"} else has.get("GPU", 0.0))
        print(found.describe(), flush=True)
        yield found
    finally:
        if owns:
            ray.shutdown()


def _grid(plan: Plan, names: Sequence[str], stop: GracefulStop) -> None:
    """Run the runs, each once; one that fails ends none of the others."""
    from launch.sweeps.workers import JobWorkers, TaskWorkers, Workers

    folder = plan.folder
    with contextlib.ExitStack() as held:
        workers: Workers
        if plan.jobs:
            parallel = plan.parallel or JOBS
            workers = JobWorkers(os.environ.get("RAY_API_SERVER_ADDRESS"), folder.path)
        else:
            found = held.enter_context(_cluster(plan, len(names), stop))
            parallel, workers = found.parallel, TaskWorkers(found, folder.stop_file)
        totals = {name: config.train.total_steps for name, config in plan.runs.items()}
        table = held.enter_context(contextlib.closing(SweepTable(folder, lambda: list(plan.runs), totals)))
        waiting, asked = deque(names), False
        while waiting or workers.running:
            if stop.requested and not asked:
                asked = True
                waiting.clear()
                table.say("stopping: every run saves")
                workers.stop()
            while waiting and workers.running < parallel:
                name = waiting.popleft()
                workers.start(name, one_run(folder, name))
            for ending in workers.ended() if workers.running else ():
                if ending.error:
                    folder.failed(ending.name, ending.error)
                    table.say(f"{ending.name} failed: {last_line(ending.error)}")
            table.refresh()


def one_run(folder: SweepFolder, name: str) -> OneRun:
    return OneRun(folder.config_of(name), folder.path / name, folder.log_of(name), folder.stop_file, Path.cwd())


def _search(plan: Plan, search: SearchConfig, stop: GracefulStop) -> None:
    """Let Ray Tune run the samples. A thread shows the table, and passes Ctrl-C on to the runs."""
    folder, total = plan.folder, plan.runs[BASE].train.total_steps
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C is for the runs first, which save
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the table is ours
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # errors are shown from the runs' own logs
    over = threading.Event()

    def watch() -> None:
        ended = False
        while not over.wait(REFRESH_SECONDS):
            ended = ended or (stop.requested and interrupt_search(folder))
            table.refresh()

    with _cluster(plan, search.samples, stop) as found:
        table = SweepTable(folder, folder.runs_of_search, total)
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            outcome = run_search(search, folder, one_run(folder, BASE), found, total)
        finally:
            over.set()
            watcher.join()
            table.close()
    for name, error in outcome.errors.items():
        if not stop.requested:  # else they saved
            folder.failed(name, error)
    if outcome.best:
        print(f"\nbest: {outcome.best}")


def _conclude(plan: Plan, interrupted: bool) -> int:
    folder = plan.folder
    names = folder.runs_of_search() if plan.search else list(plan.runs)
    for name, error in folder.errors.items():
        print(f"\n{name} failed:\n{error}\n(all it said: {folder.log_of(name)})", file=sys.stderr)
    with contextlib.suppress(FileNotFoundError, ValueError):  # no run has metrics yet
        print(f"\n{write_comparison([folder.path], default_page(folder.path))}")
    if interrupted:
        print(_go_on(plan))
        return INTERRUPTED
    if folder.errors:
        print(f"\n{len(folder.errors)} of {len(names)} runs failed; try them again with:\n  {_command(plan)}")
    return 1 if folder.errors else 0


def _go_on(plan: Plan) -> str:
    return f"go on with:\n  {_command(plan)}"


def _command(plan: Plan) -> str:
    return shlex.join(["python", "-m", plan.program, *plan.argv])


if __name__ == "__main__":
    sys.exit(main())
