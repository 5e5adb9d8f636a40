"""A search over settings by Ray Tune, which runs each sample as a grid runs its configurations."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from launch.sweeps.folder import SweepFolder, is_held
from launch.sweeps.process import INTERRUPTED, OneRun, error_of, train_one
from launch.sweeps.slots import Slots

DISTRIBUTIONS = (
    "uniform", "quniform", "loguniform", "qloguniform", "randint", "qrandint", "lograndint", "choice", "grid_search",
)  # fmt: skip
LISTS = ("choice", "grid_search")  # those that list their values
SAVE_SECONDS = 120.0  # for a run to save
HOLD_SECONDS = 1.0
STUDY = "tune"  # Ray Tune's own folder inside the sweep's


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """A search by Ray Tune instead of a grid.

    Args:
        space: for each field a distribution of Ray Tune with its arguments, as agent.lr: {loguniform: [1e-5, 1e-3]}
        samples: configurations that are tried
        metric: a name in metrics.jsonl
        mode: max or min of the metric
        asha: end runs early that are worse than others after as many steps (ASHA, Li et al. 2020)
        grace_steps: environment steps that ASHA leaves every run; 0 takes a tenth of train.total_steps
        reduction: of as many runs, ASHA continues one at each of its rungs
        seed: seed of the samples
    """

    space: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: int = 10
    metric: str = "eval/return_mean"
    mode: Literal["max", "min"] = "max"
    asha: bool = True
    grace_steps: int = 0
    reduction: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if find_spec("pandas") is None or find_spec("pyarrow") is None:  # Ray Tune's
            raise ValueError("a search needs Ray Tune. Install it with: pip install 'worldloom[tune]'")
        if not self.space:
            raise ValueError("search.space is empty, expected fields such as agent.lr: {loguniform: [1e-5, 1e-3]}.")
        for name, distribution in self.space.items():
            if len(distribution) != 1 or next(iter(distribution)) not in DISTRIBUTIONS:
                raise ValueError(
                    f"search.space.{name} is {distribution}, expected one of {', '.join(DISTRIBUTIONS)} with its "
                    "arguments, such as {loguniform: [1e-5, 1e-3]}."
                )
        if self.samples < 1 or self.reduction < 2 or self.grace_steps < 0:
            raise ValueError(
                "search.samples is at least 1, search.reduction at least 2 and search.grace_steps 0 or more."
            )


def tune_space(space: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return Ray Tune's distributions. Raises ValueError for arguments that a distribution does not take."""
    from ray import tune

    found = {}
    for name, distribution in space.items():
        ((kind, arguments),) = distribution.items()
        several = isinstance(arguments, list) and kind not in LISTS
        try:
            found[name] = getattr(tune, kind)(*arguments if several else [arguments])
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"search.space.{name}: {kind} does not take {arguments!r}: {error}") from error
    return found


def one_sample(search: SearchConfig) -> dict[str, Any]:
    """Return a value for each field of the space, with which its names and types can be checked."""
    return {
        name: domain["grid_search"][0] if isinstance(domain, dict) else domain.sample()
        for name, domain in tune_space(search.space).items()
    }


def samples_to_check(search: SearchConfig) -> list[dict[str, Any]]:
    """Return samples that hold every value of each choice, besides one of each other distribution."""
    one = one_sample(search)
    listed = [
        {**one, name: value}
        for name, distribution in search.space.items()
        for kind, values in distribution.items()
        if kind in LISTS
        for value in values
    ]
    return [one, *listed]


def as_texts(sampled: Mapping[str, Any]) -> dict[str, str]:
    """Return values as the command line takes them: null, and not None."""
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in sampled.items()}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in plain.items()}


class NewLines:
    """Reads the lines of a metrics.jsonl that are new since the last call."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0

    def read(self) -> list[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                new = file.read()
        except OSError:
            return []
        whole = new[: new.rfind(b"\n") + 1]
        self._at += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def search_trainable(sampled: dict[str, Any], base: OneRun, sweep: Path, metric: str) -> None:
    """Train one sample and report its metric to Ray Tune, which may end it early. Raises RuntimeError if it fails."""
    from ray import tune

    name = sample_name(tune.get_context().get_trial_id())
    run_dir, log = sweep / name, sweep / "logs" / f"{name}.log"
    lines = NewLines(run_dir / "metrics.jsonl")

    def report() -> None:
        for line in lines.read():
            if metric in line:
                tune.report({metric: line[metric], "env_steps": line["env_steps"]})

    code = train_one(replace(base, run_dir=run_dir, log=log, overrides=as_texts(sampled)), report)
    while code == INTERRUPTED and base.stop_file.exists():  # it must not end: then Ray Tune would not resume it
        time.sleep(HOLD_SECONDS)
    if code:
        raise RuntimeError(error_of(log, code))


def sample_name(trial_id: str) -> str:
    return f"sample-{trial_id.rpartition('_')[2]}"


@dataclass(frozen=True)
class Found:
    """The result of a search. errors: by the names of runs that failed. best: the best run, in words."""

    errors: dict[str, str]
    best: str | None


def run_search(search: SearchConfig, folder: SweepFolder, base: OneRun, slots: Slots, total_steps: int) -> Found:
    """Run the search, or go on with it."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    trainable = tune.with_resources(
        tune.with_parameters(search_trainable, base=base, sweep=folder.path, metric=search.metric),
        {"cpu": slots.cpus, "gpu": slots.gpus},
    )
    scheduler = None
    if search.asha:
        grace = search.grace_steps or max(total_steps // 10, 1)
        scheduler = ASHAScheduler(
            time_attr="env_steps",
            max_t=2 * total_steps,  # a run that reaches total_steps ends by itself
            grace_period=grace,
            reduction_factor=search.reduction,
        )
    study = folder.path / STUDY
    if tune.Tuner.can_restore(str(study)):
        tuner = tune.Tuner.restore(str(study), trainable=trainable, resume_unfinished=True, restart_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=tune_space(search.space),
            tune_config=tune.TuneConfig(
                metric=search.metric,
                mode=search.mode,
                num_samples=search.samples,
                scheduler=scheduler,
                search_alg=tune.search.BasicVariantGenerator(random_state=search.seed, max_concurrent=slots.parallel),
            ),
            run_config=tune.RunConfig(name=STUDY, storage_path=str(folder.path), verbose=0),
        )
    results = tuner.fit()
    _wait_for_the_last(folder)
    return _found(results, search, folder)


def _wait_for_the_last(folder: SweepFolder) -> None:
    """Wait until runs that Ray Tune has ended have saved."""
    deadline = time.monotonic() + SAVE_SECONDS
    while any_works(folder) and time.monotonic() < deadline:
        time.sleep(0.2)


def any_works(folder: SweepFolder) -> bool:
    return any(map(is_held, folder.path.glob("sample-*")))


def interrupt_search(folder: SweepFolder) -> bool:
    """Ask all runs to save; once they have, end Ray Tune's loop. Call it again and again until it returns True.

    SIGUSR1 is Ray Tune's own signal for this: what was running is resumed when the search goes on.
    """
    folder.stop_file.touch()
    if any_works(folder) or not callable(signal.getsignal(signal.SIGUSR1)):  # else the signal would end this process
        return False
    os.kill(os.getpid(), signal.SIGUSR1)
    return True


def _found(results: Any, search: SearchConfig, folder: SweepFolder) -> Found:
    errors: dict[str, str] = {}
    scores: list[tuple[float, str]] = []
    for i in range(len(results)):
        name = sample_name((results[i].metrics or {}).get("trial_id", str(i)))
        if results[i].error is not None:
            errors[name] = error_of(folder.log_of(name), 1)
        elif search.metric in results[i].metrics:
            settings = ", ".join(f"{field} {value}" for field, value in results[i].config.items())
            score = results[i].metrics[search.metric]
            scores.append((score, f"{name} with {settings}: {search.metric} {score:,.2f}"))
    if not scores:
        return Found(errors, None)
    return Found(errors, (max(scores) if search.mode == "max" else min(scores))[1])
