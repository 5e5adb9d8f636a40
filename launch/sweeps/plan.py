"""The plan of a sweep: the command line of launch.sweep, checked before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch.arguments import Parser, run_config, run_parser
from launch.places import run_place
from launch.sweeps.folder import SweepFolder
from launch.sweeps.grid import combinations, run_names, take_axes
from launch.sweeps.search import SearchConfig, as_texts, samples_to_check
from worldloom.runs.build import check_config, check_device_for_ray
from worldloom.runs.config import RunConfig

BASE = "base"  # the configuration that the samples of a search change


@dataclass(frozen=True)
class Plan:
    """Holds what a command asks for. runs: a configuration for each run; of a search, the one that samples change."""

    argv: list[str]
    folder: SweepFolder
    runs: dict[str, RunConfig]
    search: SearchConfig | None
    parallel: int | None
    jobs: bool
    program: str = "launch.sweep"  # that goes on with it


def sweep_parser() -> Parser:
    parser = run_parser("launch.sweep", DESCRIPTION)
    parser.add_argument("--sweep-dir", dest="sweep_dir", type=str, default=None, help=SWEEP_DIR_HELP)
    parser.add_argument("--parallel", type=int | Literal["auto"], default="auto", help=PARALLEL_HELP)
    parser.add_argument("--as", dest="runs_as", type=Literal["tasks", "jobs"], default="tasks", help=AS_HELP)
    parser.add_argument("--search", type=SearchConfig | None, default=None, help=SEARCH_HELP)
    return parser


def read_plan(parser: Parser, argv: Sequence[str]) -> Plan:
    """Return what the command asks for. Raises ValueError if it is impossible."""
    rest, axes = take_axes(argv, OWN)
    parsed = parser.parse_args(rest)
    built = parser.instantiate_classes(parsed)
    search: SearchConfig | None = built.search
    jobs = parsed.runs_as == "jobs"
    inline = [] if jobs else ["--runtime.kind", "inline"]

    def configured(values: dict[str, Any]) -> RunConfig:
        changes = [f"--{name}={value}" for name, value in values.items()]
        config = run_config(parser, parser.parse_args([*rest, *changes, *inline]))
        check_config(config)
        if not jobs:
            check_device_for_ray(config.train.device)
        return config

    if search is None and not axes:
        raise ValueError("nothing varies. Give a field several values, such as --train.seed 0..4, or a search.")
    if search is not None and (axes or jobs):
        what = f"--{next(iter(axes))} has several values" if axes else "--as is jobs"
        raise ValueError(
            f"{what}, but a search has its values in search.space and runs in tasks. Take one of the two out."
        )
    if parsed.parallel != "auto" and parsed.parallel < 1:
        raise ValueError(f"--parallel is {parsed.parallel}, expected auto or at least 1.")
    if search is not None:
        for sample in samples_to_check(search):  # the names and types of the space
            configured(as_texts(sample))
        runs = {BASE: configured({})}
    else:
        points = combinations(axes)
        runs = {name: configured(values) for name, values in zip(run_names(points), points, strict=True)}
    given = parsed.sweep_dir or Path("runs") / f"{_stem(rest, next(iter(runs.values())))}-sweep"
    parallel = None if parsed.parallel == "auto" else parsed.parallel
    return Plan(list(argv), SweepFolder(run_place(str(given))), runs, search, parallel, jobs)


def _stem(argv: Sequence[str], config: RunConfig) -> str:
    """Return the name of the configuration file or, without one, of the algorithm."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word.startswith("--config"):
            return Path(word.partition("=")[2] or following).stem
    return config.algorithm.replace(":", "-").replace("/", "-")


DESCRIPTION = (
    "Train several configurations: a field takes several values (--train.seed 0..4, --agent.lr 1e-4,3e-4), and every "
    "combination is a run. The same command goes on with what is not finished."
)
SWEEP_DIR_HELP = "folder of the sweep; default: runs/CONFIG-sweep, after the name of the configuration file"
PARALLEL_HELP = "runs at once; auto takes one for each CPU of the cluster and, with GPUs, at most four for each"
AS_HELP = (
    "tasks: each run is a Ray task and trains in one process; jobs: each run is a Ray job with its own runtime, on the "
    "cluster of RAY_API_SERVER_ADDRESS"
)
SEARCH_HELP = "a search by Ray Tune instead of a grid"
OWN = {"config", "sweep-dir", "sweep_dir", "parallel", "as", "protocols", "help"}
