"""The claim of a process on a run directory: a lock, a heartbeat, and a last word if the process dies without one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

LOCK, HEARTBEAT = ".lock", ".heartbeat"
BEAT_SECONDS = 5.0
END_SECONDS = 10.0  # for the watcher to end
SILENT_SECONDS = 30.0  # a process whose heartbeat is older counts as gone: it may be on another machine
CLEAN = b"."  # what the watcher reads from a process that ends in order


@dataclass(frozen=True)
class Holder:
    """The process that holds, or held, a run directory. started: seconds since 1970."""

    host: str
    pid: int
    started: float

    def describe(self) -> str:
        begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host}, started {begun}"


def holder_of(run_dir: Path) -> Holder | None:
    """Return the process that holds the directory, or died while it did; None after an orderly end."""
    try:
        return Holder(**json.loads((run_dir / LOCK).read_text()))
    except (OSError, ValueError, TypeError):  # no claim, or one of an earlier version
        return None


def silence(run_dir: Path, holder: Holder) -> float:
    """Return the seconds since the holder's last heartbeat; infinity if its process is known to be gone."""
    if holder.host == socket.gethostname():
        try:
            os.kill(holder.pid, 0)
        except ProcessLookupError:
            return float("inf")
        except PermissionError:  # it lives, under another user
            pass
    try:
        return max(time.time() - (run_dir / HEARTBEAT).stat().st_mtime, 0.0)
    except OSError:
        return max(time.time() - holder.started, 0.0)


class Claim:
    """A context in which this process holds a run directory.

    last_word: what is printed if this process dies without an orderly end (killed, or ended by Ray because its cluster
    is gone) and a checkpoint lies in run_dir; anyway: even if none does, because they lie elsewhere. Raises InUse if
    another process holds the directory.
    """

    def __init__(self, run_dir: Path, last_word: str, anyway: bool = False) -> None:
        self._dir, self._last_word, self._anyway = run_dir, last_word, anyway
        self._holder = Holder(socket.gethostname(), os.getpid(), time.time())
        self._lock: IO[str] | None = None
        self._ended = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Claim:
        self._take()
        self._watcher = subprocess.Popen(
            [
                sys.executable,
                "-S",
                __file__,
                str(os.getpid()),
                str(self._dir.resolve()),
                self._last_word,
                str(self._anyway),
            ],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in the terminal is not meant for it
        )
        self._pulse.start()
        os.register_at_fork(after_in_child=self._let_go)
        return self

    def _let_go(self) -> None:
        """Close what a forked process got of this one's: it may live longer, and would keep the lock."""
        if self._lock is not None:
            self._lock.close()
        if self._watcher.stdin is not None:
            self._watcher.stdin.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._pulse.join()
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # somebody ended it, or stopped it
            self._watcher.communicate(CLEAN, timeout=END_SECONDS)
        (self._dir / HEARTBEAT).unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.truncate(0)
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()

    def _take(self) -> None:
        lock = (self._dir / LOCK).open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            found = holder_of(self._dir)
            from worldloom.runs.lease import InUse  # not above: as the watcher, this file runs without packages

            raise InUse(
                f"{self._dir} is in use by {found.describe() if found else 'another process'}. Wait for it, or choose "
                "another --run-dir."
            ) from None
        lock.truncate(0)
        lock.write(json.dumps(asdict(self._holder)) + "\n")
        lock.flush()
        self._lock = lock
        (self._dir / HEARTBEAT).touch()

    def _beat(self) -> None:
        """Renew the heartbeat; take the directory again if it was deleted and made anew."""
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError, ValueError):  # a full disk, or a directory that is gone for now
                (self._dir / HEARTBEAT).touch() if (self._dir / LOCK).exists() else self._take()


def watch(pid: int, run_dir: Path, last_word: str, anyway: bool) -> None:
    """Wait for the end of process `pid`, whose pipe is standard input; print the last word unless it ended in order."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.buffer.read(1) == CLEAN:  # not up to its end, which comes with that of the last forked process
        return
    saved = anyway or any(run_dir.glob("checkpoints/step-*/manifest.json"))
    told = last_word if saved else "Nothing was saved yet."
    print(
        f"launch.train: process {pid} ended without a word: killed, or its Ray cluster is gone. {told}", file=sys.stderr
    )


if __name__ == "__main__":
    watch(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "True")
