"""Joining or starting Ray, and sharing out its logical CPUs."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from distributed.ray_internals import end_by_sigkill, free_cpus_by_node, note_in_job
from distributed.signals import sigterm_blocked
from worldloom.runs.config import RunConfig

logger = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parent.parent
FREE_CPU_SECONDS = 60.0  # to wait for a CPU: actors that just ended give theirs back late
OBJECT_STORE_BYTES = 512 * 2**20  # of a local cluster: chunks and batches in flight, two versions of the weights


@dataclass(frozen=True)
class Shares:
    """Logical resources and threads of each process."""

    cpus: float  # of each learner and of each env actor; replay and coordinator ask for none
    gpus: float  # of each learner
    server_gpus: float  # of an acting server in an actor of its own
    learner_threads: int
    processes: int  # that ask for `cpus` each
    learners: int = 1

    def describe(self, own: bool) -> str:
        """Return a sentence that compares what is asked for with what the cluster has; own: this run started it."""
        if own:  # its logical CPUs are at least one for each process
            gpus = ray.cluster_resources().get("GPU", 0.0)
            return f"this machine: {usable_cpus()} CPUs and {gpus:g} GPUs for {self.processes} processes"
        total, gpus = ray.cluster_resources(), self.gpus * self.learners + self.server_gpus
        nodes = sum(1 for node in ray.nodes() if node["Alive"])
        return (
            f"cluster: {nodes} node(s) with {total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs; asked "
            f"for: {self.processes} processes x {self.cpus:g} CPUs, {gpus:g} GPUs"
        )


@contextlib.contextmanager
def ray_log(path: Path) -> Iterator[None]:
    """A context in which a file keeps what Ray says in this process; only its errors reach the screen, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ray_logger = logging.getLogger("ray")
    kept = logging.FileHandler(path, delay=True)
    kept.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(filename)s:%(lineno)s -- %(message)s"))
    screens = [(handler, handler.level) for handler in ray_logger.handlers]
    for handler, _ in screens:
        handler.setLevel(logging.ERROR)
    ray_logger.addHandler(kept)
    try:
        yield
    finally:
        ray_logger.removeHandler(kept)
        kept.close()
        for handler, level in screens:
            handler.setLevel(level)


def connect(config: RunConfig, namespace: str, run: str) -> bool:
    """Join this process's Ray or the cluster of RAY_ADDRESS, or start one. Return whether to end it afterwards.

    run: folder or URL of the run, for the metadata of the job that this process is, if it is one.

    Raises RuntimeError if the cluster does not answer or refuses the token.
    """
    try:
        return _connect(config, namespace, run)
    except (AuthenticationError, ConnectionError) as error:
        raise RuntimeError(f"Ray cannot be reached: {error}") from error


def _connect(config: RunConfig, namespace: str, run: str) -> bool:
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of a task's several results the coordinator reads one
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"namespace": namespace, "log_to_driver": False, "logging_level": logging.WARNING}
    if address:
        print(f"joining the Ray cluster at {address} …", flush=True)
        ray.init(address=address, **options)
        note_in_job("worldloom_run", run)
        return False
    print("starting Ray on this machine …", flush=True)
    _set_private_token()
    paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with sigterm_blocked():
        ray.init(
            address="local",  # never another cluster that happens to run here
            num_cpus=max(usable_cpus(), config.runtime.learners + config.runtime.env_actors),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}},
            **options,
        )
    end_by_sigkill()
    return True


def _set_private_token() -> None:
    """Set a token that only this run's own cluster uses.

    Left to itself, ray.init writes one into the home directory, and that file turns authentication on for every cluster
    that this user starts later, whose `ray job submit` is then refused without RAY_AUTH_MODE=token.
    """
    if not any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def share(config: RunConfig) -> Shares:
    """Fit learners and env actors into what the cluster has free, with fractions of CPUs where it is small.

    Raises RuntimeError if no CPU comes free, or a GPU was asked for that the cluster lacks.
    """
    own_server = config.runtime.acting_server == "actor" and config.runtime.acting != "local"
    processes = config.runtime.learners + config.runtime.env_actors + int(own_server)
    deadline = time.monotonic() + FREE_CPU_SECONDS
    if cpus_for(processes, free_cpus_by_node()) <= 0:
        print(f"waiting for free CPUs in the cluster: {processes} processes need some", flush=True)
    while (cpus := cpus_for(processes, free_cpus_by_node())) <= 0:
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"the cluster had no free CPU for {FREE_CPU_SECONDS:.0f} s, but {processes} processes need some. "
                "Wait for other jobs to end, or add nodes."
            )
        time.sleep(0.2)
    device, processes_on_gpus = config.train.device, config.runtime.learners + int(own_server)
    wanted = {"auto": processes_on_gpus, "cuda": processes_on_gpus, "cpu": 0}.get(device, 1)  # all share one cuda:0
    learner, server = _share_gpus(config, _free_gpus(wanted, deadline), own_server)
    threads = config.runtime.learner_threads or learner_threads(config)
    return Shares(cpus, learner, server, threads, processes, config.runtime.learners)


def _free_gpus(wanted: int, deadline: float) -> float:
    """Return the GPUs that are free, once these are as many as wanted or as the cluster has, else at the deadline.

    Those of actors that have just ended come free late.
    """
    enough, told = min(float(wanted), float(ray.cluster_resources().get("GPU", 0.0))), False
    while (free := float(ray.available_resources().get("GPU", 0.0))) < enough and time.monotonic() < deadline:
        if not told:
            print(f"waiting for free GPUs in the cluster: {enough:g} are wanted, {free:g} are free", flush=True)
            told = True
        time.sleep(0.2)
    return free


def _share_gpus(config: RunConfig, gpus: float, own_server: bool) -> tuple[float, float]:
    """Return the GPUs of each learner and of an acting server in an actor of its own, of `gpus` that are free."""
    device, learners = config.train.device, config.runtime.learners
    if device.startswith("cuda") and gpus < 1:
        raise RuntimeError(f"train.device is {device!r}, but the cluster has {gpus:g} free GPUs. Use auto or cpu.")
    if device == "cpu" or gpus < 1:
        return 0.0, 0.0
    if learners == 1:
        return (1.0, float(own_server)) if gpus >= 2 or not own_server else (0.5, 0.5)
    if device.startswith("cuda:"):  # one for all, which Ray counts in hundredths
        part = math.floor(100 / (learners + own_server)) / 100
        return part, part * own_server
    if gpus < learners + own_server:
        server = ", and the acting server another (runtime.acting_server: actor)" if own_server else ""
        raise RuntimeError(
            f"runtime.learners is {learners}, each on a GPU of its own{server}, but {gpus:g} GPUs of the cluster are "
            "free. Lower runtime.learners; or set train.device to cuda:0, which has all of them share one, or to cpu."
        )
    return 1.0, float(own_server)


def usable_cpus() -> int:
    """Return the CPUs that this process may use, which a batch system or a container may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpus_for(processes: int, free: Sequence[float]) -> float:
    """The largest share of a CPU, at most 1 and in hundredths, of which nodes with `free` CPUs hold so many."""
    for hundredths in range(100, 0, -1):
        if sum(math.floor(100 * cpus / hundredths + 1e-6) for cpus in free) >= processes:
            return hundredths / 100
    return 0.0


def check_object_store(node: str, batch_bytes: int, batches: int) -> None:
    """Raises RuntimeError if the object store of that node cannot hold one batch; warns where it cannot hold all that
    are under way."""
    has = next(n["Resources"].get("object_store_memory", 0.0) for n in ray.nodes() if n["NodeID"] == node)
    batch, store = f"{batch_bytes / 2**20:,.0f} MiB", f"{has / 2**20:,.0f} MiB"
    remedy = "Start Ray with a larger object_store_memory, or lower agent.batch_size."
    if batch_bytes > 0.9 * has:
        raise RuntimeError(f"a batch takes {batch}, but the learner's node has an object store of {store}. {remedy}")
    if 2 * batches * batch_bytes > has:
        logger.warning("%d batches of %s may be under way in an object store of %s. %s", batches, batch, store, remedy)


def learner_threads(config: RunConfig) -> int:
    """Return each learner's share of this machine's cores that env actors leave, at least one."""
    return max((usable_cpus() - max(config.runtime.env_actors, 1)) // config.runtime.learners, 1)
