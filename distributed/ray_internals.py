"""Everything private of Ray that a run touches. Where Ray changes, a run goes on with less, and says so once."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Callable
from typing import Any, Protocol

import ray

logger = logging.getLogger(__name__)

CHANGED = (ImportError, AttributeError, TypeError)  # what a private part raises once it is another


class StoreStats(Protocol):
    """Counts of the object stores of all nodes together."""

    object_store_bytes_used: int
    object_store_bytes_avail: int
    cumulative_created_bytes: int
    spilled_bytes_total: int


@functools.cache
def _say_once(what: str, instead: str) -> None:
    logger.warning("Ray %s does not give %s as Ray 2.60 does: %s.", ray.__version__, what, instead)


def free_cpus_by_node() -> list[float]:
    """Return the free logical CPUs of each node; public functions give only their sum."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    free = float(ray.available_resources().get("CPU", 0.0))
    if len(nodes) == 1:
        return [free]
    try:
        from ray._private.state import available_resources_per_node

        return [float(node.get("CPU", 0.0)) for node in available_resources_per_node().values()]
    except CHANGED:
        _say_once("free CPUs by node", "they are taken to be spread in proportion to all CPUs")
        total = [float(node["Resources"].get("CPU", 0.0)) for node in nodes]
        return [free * cpus / max(sum(total), 1.0) for cpus in total]


def draining_nodes() -> set[str]:
    """Return the ids of nodes that will go, by `ray drain-node` or a preemption notice; nothing public gives them."""
    try:
        from ray._private.state import state

        return set(state.get_draining_nodes())
    except CHANGED:
        _say_once("the nodes that are about to go", "env actors there are replaced when they die")
        return set()


def note_in_job(name: str, value: str) -> None:
    """Add to the metadata of the job that started this process, if one did; publicly only who submits it may."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {}).get("job_submission_id")
    if job is None:
        return
    try:
        from ray._private.ray_constants import KV_NAMESPACE_JOB
        from ray.dashboard.modules.job.common import JobInfoStorageClient
        from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

        key = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=job).encode()
        about = json.loads(_internal_kv_get(key, namespace=KV_NAMESPACE_JOB))
        about["metadata"] = {**(about["metadata"] or {}), name: value}
        _internal_kv_put(key, json.dumps(about).encode(), overwrite=True, namespace=KV_NAMESPACE_JOB)
    except (*CHANGED, LookupError, ValueError):
        _say_once("the metadata of a job", f"{name} is not among them")


def end_by_sigkill() -> None:
    """Have the cluster that this process started end by SIGKILL: Ray waits a second for each process to heed SIGTERM.

    The raylet's own processes are ended with it; left alone, they look for it every few seconds.
    """
    import psutil  # type: ignore[import-untyped]  # Ray brings it

    try:
        from ray._private import worker

        node: Any = worker._global_node
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        end = node.kill_all_processes
    except (*CHANGED, LookupError):
        _say_once("the processes of its local cluster", "a run takes a few seconds longer to end")
        return

    def end_at_once(**options: Any) -> None:
        started = []
        with contextlib.suppress(psutil.NoSuchProcess):
            started = raylet.children(recursive=True)
        end(**{**options, "allow_graceful": False})
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    node.kill_all_processes = end_at_once


class ObjectStoreStats:
    """Reads counts of the cluster's object stores; publicly they are on the dashboard alone."""

    def __init__(self) -> None:
        try:
            from ray._private import internal_api

            self._state = internal_api.get_state_from_address(ray.get_runtime_context().gcs_address)
            self._read: Callable[[Any], Any] | None = internal_api.get_memory_info_reply
        except CHANGED:
            self._read = None

    def read(self) -> StoreStats | None:
        """The counts, None where no node answers."""
        import grpc  # type: ignore[import-untyped]

        try:
            if self._read is not None:
                stats: StoreStats = self._read(self._state).store_stats
                return stats
        except grpc.RpcError:  # of a node that is going
            return None
        except CHANGED:
            self._read = None
        _say_once("the use of its object store", "the metrics plasma/* are missing")
        return None
