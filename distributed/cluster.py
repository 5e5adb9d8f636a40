"""Joining or starting Ray, and sharing out its logical CPUs."""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from worldloom.training.config import RunConfig

CHECKOUT = Path(__file__).resolve().parent.parent
FREE_CPU_SECONDS = 60.0  # to wait for a CPU: actors that just ended give theirs back late
OBJECT_STORE_BYTES = 512 * 2**20  # of a local cluster: chunks and batches in flight, two versions of the weights


@dataclass(frozen=True)
class Shares:
    """Logical resources and threads of each process."""

    cpus: float  # of the learner and of each env actor; replay and coordinator ask for none
    gpus: float  # of the learner
    server_gpus: float  # of an acting server in an actor of its own
    learner_threads: int


def connect(config: RunConfig, namespace: str) -> bool:
    """Join this process's Ray or the cluster of RAY_ADDRESS, or start one. Returns whether to end it afterwards.

    Raises RuntimeError if the cluster does not answer or refuses the token.
    """
    try:
        return _connect(config, namespace)
    except (AuthenticationError, ConnectionError) as error:
        raise RuntimeError(f"Ray cannot be reached: {error}") from error


def _connect(config: RunConfig, namespace: str) -> bool:
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"namespace": namespace, "log_to_driver": False, "logging_level": logging.WARNING}
    if address:
        ray.init(address=address, **options)
        return False
    _set_private_token()
    paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ray.init(
        address="local",  # never another cluster that happens to run here
        num_cpus=max(os.cpu_count() or 1, 1 + config.runtime.env_actors),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}},
        **options,
    )
    return True


def _set_private_token() -> None:
    """A token for this run's own cluster alone.

    Left to itself, ray.init writes one into the home directory, and that file turns authentication on for every cluster
    that this user starts later, whose `ray job submit` is then refused without RAY_AUTH_MODE=token.
    """
    if not any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def share(config: RunConfig) -> Shares:
    """Fit the learner and env actors into what the cluster has free, with fractions of CPUs where it is small.

    Raises RuntimeError if no CPU comes free, or a GPU was asked for that the cluster lacks.
    """
    own_server = config.runtime.acting_server == "actor" and config.runtime.acting != "local"
    processes = 1 + config.runtime.env_actors + int(own_server)
    deadline = time.monotonic() + FREE_CPU_SECONDS
    while (cpus := min(1.0, math.floor(100 * (free := _free()).get("CPU", 0.0) / processes) / 100)) <= 0:
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"the cluster had no free CPU for {FREE_CPU_SECONDS:.0f} s, but {processes} processes need some. "
                "Wait for other jobs to end, or add nodes."
            )
        time.sleep(0.2)
    wants_gpu = config.train.device.startswith("cuda")
    gpus = free.get("GPU", 0.0)
    if wants_gpu and gpus < 1:
        raise RuntimeError(
            f"train.device is {config.train.device!r}, but the cluster has {gpus:g} free GPUs. Use auto or cpu."
        )
    takes_gpu = wants_gpu or (config.train.device == "auto" and gpus >= 1)
    learner, server = 0.0, 0.0
    if takes_gpu:
        learner, server = (1.0, float(own_server)) if gpus >= 2 or not own_server else (0.5, 0.5)
    return Shares(cpus, learner, server, config.runtime.learner_threads or learner_threads(config))


def _free() -> dict[str, float]:
    free: dict[str, float] = ray.available_resources()
    return free


def learner_threads(config: RunConfig) -> int:
    """What env actors leave of this machine's cores, at least one."""
    return max((os.cpu_count() or 1) - max(config.runtime.env_actors, 1), 1)
