"""A learner's place among several: how they find each other, and what each can tell of its state."""

from __future__ import annotations

import datetime
import os
import socket
from dataclasses import dataclass
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout  # nothing public changes a group's bound

from worldloom.gang import ALONE, Gang
from worldloom.runs.learners import carried_of, fingerprint

_store: Any = dist.TCPStore  # type: ignore[attr-defined]  # public, but not among the names that torch exports
JOIN_SECONDS = 60.0  # for a learner to find the store at which all meet, and then the others


class GangBroken(RuntimeError):
    """Says that learners cannot exchange what an update needs: one of them died, hangs or cannot be reached."""


@dataclass(frozen=True)
class Seat:
    """Holds the place that a learner is to take."""

    rank: int
    size: int
    host: str  # address of rank 0's store, at which all meet
    port: int
    backend: str  # nccl or gloo
    seconds: float  # bound on one exchange
    preparing_seconds: float  # the same while some may compile longer than others


@dataclass(frozen=True)
class About:
    """Holds facts about a learner's process that must fit those of the others."""

    node: str  # its id
    torch: str  # version
    cuda: bool  # whether it has a GPU


@dataclass(frozen=True)
class Receipt:
    """Holds the state of a learner after a task; those of all learners must be equal."""

    updates: int  # that its agent has made
    version: int  # of the weights that were published last
    digest: str | None  # of all that updates hand on, where it was due


class Member:
    """A learner's membership in a gang; alone until it joins one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.gang, self.captures = ALONE, True  # whether updates can be CUDA graphs: gloo exchanges on the host
        self._store: Any = None  # rank 0's, which the process keeps alive
        self._seat: Seat | None = None

    @property
    def seconds(self) -> float | None:
        """The bound on one exchange, None of a learner alone."""
        return None if self._seat is None else self._seat.seconds

    @staticmethod
    def about() -> About:
        """Return what must fit the other learners' processes."""
        return About(str(ray.get_runtime_context().get_node_id()), str(torch.__version__), torch.cuda.is_available())

    def host(self) -> tuple[str, int]:
        """Open the store at which all learners meet, on a port that is free; return its address. Raises GangBroken."""
        address, seconds = str(ray.util.get_node_ip_address()), datetime.timedelta(seconds=JOIN_SECONDS)
        try:
            self._store = _store(address, 0, is_master=True, wait_for_workers=False, timeout=seconds)
        except RuntimeError as error:
            raise GangBroken(
                f"{self.name} could not open a port at {address}, its node's address in Ray, where the learners meet: "
                f"{error}. Look at the node's firewall, and at the address that `ray start` was given"
            ) from error
        return address, int(self._store.port)

    def join(self, seat: Seat) -> None:
        """Meet the others. Raises GangBroken if this learner cannot."""
        _use_interface_of(str(ray.util.get_node_ip_address()))
        try:
            store = _store(seat.host, seat.port, is_master=False, timeout=datetime.timedelta(seconds=JOIN_SECONDS))
            dist.init_process_group(
                seat.backend,
                store=store,
                rank=seat.rank,
                world_size=seat.size,
                timeout=datetime.timedelta(seconds=JOIN_SECONDS),
                device_id=torch.device("cuda", 0) if seat.backend == "nccl" else None,
            )
            dist.barrier()
            _set_pg_timeout(datetime.timedelta(seconds=seat.preparing_seconds))
        except RuntimeError as error:
            raise GangBroken(
                f"{self.name} could not join the {seat.size} learners at {seat.host}:{seat.port}: {error}. All ports "
                "must be open between their nodes; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the network"
            ) from error
        self.gang, self.captures, self._seat = Gang(seat.rank, seat.size), seat.backend == "nccl", seat

    def prepared(self) -> None:
        """Bound exchanges as closely as updates from now on, since all learners have compiled theirs."""
        if self._seat is not None:
            _set_pg_timeout(datetime.timedelta(seconds=self._seat.seconds))

    def receipt(self, agent: Any, version: int, with_digest: bool) -> Receipt | None:
        """Return what all learners of a gang must agree on; None for one alone."""
        if self.gang.size == 1:
            return None
        return Receipt(agent.updates, version, fingerprint(carried_of(agent)) if with_digest else None)

    def explain(self, error: RuntimeError) -> GangBroken | None:
        """Return what to raise, with this learner's name, for the failure of an exchange; None for other errors."""
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            return GangBroken(f"{self.name} could not exchange with the others: {error}")
        return None


def _use_interface_of(address: str) -> None:
    """Have gloo and NCCL use the network by which Ray reaches this node, unless the user chose one."""
    import psutil  # type: ignore[import-untyped]  # Ray brings it

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.family == socket.AF_INET and each.address == address for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
