"""The workers of a grid, which run its runs: Ray tasks, or Ray jobs of their own."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from launch.sweeps.folder import clear_remains
from launch.sweeps.process import INTERRUPTED, OneRun, error_of, train_one
from launch.sweeps.slots import Slots

TRIES = 3  # of a run whose machine or worker was lost; it goes on from its last checkpoint


@dataclass(frozen=True)
class Ending:
    """The end of a run: its exit code and, if it failed, its error."""

    name: str
    code: int
    error: str = ""


class Workers(Protocol):
    """A place where runs run."""

    def start(self, name: str, run: OneRun) -> None: ...

    def ended(self) -> Iterator[Ending]:
        """Wait up to a second, then return the runs that have ended since the last call."""

    def stop(self) -> None:
        """Ask all runs to save and end."""

    @property
    def running(self) -> int: ...


class TaskWorkers:
    """Runs runs in Ray tasks; each trains in a process of its own, with the in-process trainer."""

    def __init__(self, slots: Slots, stop_file: Path) -> None:
        self._slots, self._stop_file = slots, stop_file
        self._names: dict[Any, tuple[str, OneRun]] = {}
        self._task = ray.remote(num_cpus=slots.cpus, num_gpus=slots.gpus, max_retries=TRIES)(train_one)

    @property
    def running(self) -> int:
        return len(self._names)

    def start(self, name: str, run: OneRun) -> None:
        run = replace(run, threads=self._slots.threads)
        self._names[self._task.options(name=name).remote(run)] = name, run

    def ended(self) -> Iterator[Ending]:
        ready, _ = ray.wait(list(self._names), timeout=1.0)
        for reference in ready:
            name, run = self._names.pop(reference)
            try:
                code = ray.get(reference)
            except RayError as error:
                yield Ending(name, 1, f"its worker was lost: {error}")
                continue
            yield Ending(name, code, error_of(run.log, code) if code not in (0, INTERRUPTED) else "")

    def stop(self) -> None:
        self._stop_file.touch()


class JobWorkers:
    """Runs runs as Ray jobs, each with its configuration's runtime. Jobs outlive the sweep, which finds them again.

    address: of the cluster's dashboard. Raises RuntimeError if it does not answer.
    """

    def __init__(self, address: str | None, sweep: Path, pause: Callable[[], None] = lambda: time.sleep(1.0)) -> None:
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray").setLevel(logging.WARNING)  # it lists every file that it does not upload
        try:
            self._client: Any = JobSubmissionClient(address)
        except (ConnectionError, ValueError) as error:
            raise RuntimeError(
                f"--as jobs needs a cluster that runs, but none answers: {error} Name its dashboard by "
                "RAY_API_SERVER_ADDRESS=http://HEAD:8265."
            ) from error
        self._sweep, self._pause = str(sweep), pause
        self._names: dict[str, tuple[str, OneRun]] = {}

    @property
    def running(self) -> int:
        return len(self._names)

    def start(self, name: str, run: OneRun) -> None:
        """Submit a job, or watch the one that an earlier call of this sweep submitted."""
        known = self._running_job(name)
        if known is None:
            clear_remains(run.run_dir)
            known = self._client.submit_job(
                entrypoint=shlex.join(["python", "-m", "launch.train", *run.arguments()]),
                runtime_env={"working_dir": str(run.cwd)},
                metadata={"sweep": self._sweep, "run": name},
            )
        self._names[known] = name, run

    def _running_job(self, name: str) -> str | None:
        for job in self._client.list_jobs():
            about = job.metadata or {}
            if (about.get("sweep"), about.get("run")) == (self._sweep, name) and not job.status.is_terminal():
                found: str = job.submission_id
                return found
        return None

    def ended(self) -> Iterator[Ending]:
        self._pause()
        for job, (name, run) in list(self._names.items()):
            status = self._client.get_job_status(job)
            if not status.is_terminal():
                continue
            del self._names[job]
            run.log.write_text(self._client.get_job_logs(job))
            code = {"SUCCEEDED": 0, "STOPPED": INTERRUPTED}.get(status.value, 1)
            yield Ending(name, code, error_of(run.log, code) if code == 1 else "")

    def stop(self) -> None:
        for job in self._names:
            self._client.stop_job(job)
