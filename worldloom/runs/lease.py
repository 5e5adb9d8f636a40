"""The lease of a process on a run in an object store, where files cannot be locked: an object that says who writes."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from worldloom.locations import is_file, read_bytes, remove_file, write_bytes

LEASE = "lease.json"
BEAT_SECONDS = 10.0
SILENT_SECONDS = 45.0  # a lease that does not change for so long belongs to nobody
OLD_SECONDS = 600.0  # so much longer than clocks differ, that a lease of this age is not watched first


class InUse(ValueError):
    """The error of a process that wants to train a run which another process is training."""


class LeaseLost(RuntimeError):
    """The error of a process that wants to write to a run which another process has taken over."""


@dataclass(frozen=True)
class Writer:
    """The process that writes to a run. Times are seconds since 1970, of the writer's clock."""

    host: str
    pid: int
    started: float
    beat: float
    token: str

    def describe(self) -> str:
        begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host}, started {begun}"

    def gone(self) -> bool:
        """Return True if it is known to be gone: it ran here, or it has been silent for long."""
        if time.time() - self.beat > OLD_SECONDS:
            return True
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it lives, under another user
            pass
        return False


def writer_of(root: Path) -> Writer | None:
    """Return who writes to the run, or did until it was killed; None after an orderly end."""
    try:
        return Writer(**json.loads(read_bytes(root / LEASE))) if is_file(root / LEASE) else None
    except (ValueError, TypeError):  # damaged
        return None


class Lease:
    """A context in which this process writes to a run. A thread renews the lease; if another process takes the run
    over, it interrupts this process as SIGTERM would, and `check` raises.

    say: told what is waited for. Raises InUse if another process holds the run.
    """

    def __init__(self, root: Path, say: Callable[[str], None] = print) -> None:
        self._root, self._say = root, say
        now = time.time()
        self._mine = Writer(socket.gethostname(), os.getpid(), now, now, secrets.token_hex(8))
        self._ended, self._pulse = threading.Event(), threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        found = writer_of(self._root)
        if found and not found.gone():
            self._say(f"{self._root} was last written by {found.describe()}; waiting {SILENT_SECONDS:.0f} s for a sign")
            if self._changes(found):
                raise InUse(
                    f"{self._root} is in use by {found.describe()}. Wait for it, or choose another name for this run."
                )
        self._write()
        self._pulse.start()
        return self

    def __exit__(self, *about: object) -> None:
        self._ended.set()
        self._pulse.join()
        with contextlib.suppress(OSError, LeaseLost):
            self.check()
            remove_file(self._root / LEASE)

    def check(self) -> None:
        """Raise LeaseLost if another process has taken the run over, OSError if the store does not answer."""
        found = writer_of(self._root)
        if found is None:  # a process that took the run over may have ended, too: then what it wrote must stay
            raise LeaseLost(f"{self._root} has no {LEASE} any more. This process stops, and writes nothing more there.")
        if found.token != self._mine.token:
            raise LeaseLost(
                f"{self._root} was taken over by {found.describe()}, because this process gave no sign of life. "
                "This one stops, and leaves the run to it."
            )

    def _changes(self, found: Writer) -> bool:
        """Return True once the lease is renewed; False if it is not, or if it is given back."""
        deadline = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < deadline:
            now = writer_of(self._root)
            if now is None or now.gone():
                return False
            if now != found:
                return True
            time.sleep(0.5)
        return False

    def _write(self) -> None:
        write_bytes(self._root / LEASE, json.dumps({**asdict(self._mine), "beat": time.time()}).encode())

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self.check()
                self._write()
            except LeaseLost:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            except OSError:  # the store does not answer for now
                pass
