"""The home of a run: a folder, or a URL with a working folder on this machine for the files that grow."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from worldloom.locations import PARTIAL, download, files_below, is_remote, locate, upload
from worldloom.runs.lease import LEASE, Lease

logger = logging.getLogger(__name__)

MIRROR_SECONDS = 30.0  # between two uploads of the files that grow
CHECKPOINTS, SUMMARY = "checkpoints", "summary.json"


@dataclass(frozen=True)
class Home:
    """Names the places of a run.

    root: its folder or URL, with the checkpoints. dir: the folder on this machine with the files that grow: metrics,
    TensorBoard, reports; `root` itself unless that is a URL.
    """

    root: Path
    dir: Path
    lease: Lease | None = None

    def check(self) -> None:
        """Raise LeaseLost if another process has taken the run over."""
        if self.lease is not None:
            self.lease.check()


def as_home(run: str | os.PathLike[str] | Home) -> Home:
    """Return the home of a run that lies in a folder. Raises ValueError for a URL, which `open_home` opens."""
    if isinstance(run, Home):
        return run
    root = locate(run)
    if is_remote(root):
        raise ValueError(f"{root} is not a folder. Open it first: with open_home({str(root)!r}) as home: …")
    root = root.resolve()
    return Home(root, root)


@contextlib.contextmanager
def open_home(run: str | os.PathLike[str], say: Callable[[str], None] = print) -> Iterator[Home]:
    """Give the home of a run to the process that trains it.

    Of a URL, the process holds a lease; the files that grow are copied to this machine first, and from it every 30
    seconds and at the end. Raises InUse if another process holds the run, OSError if the store does not answer.
    """
    root = locate(run)
    if not is_remote(root):
        yield as_home(root)
        return
    with Lease(root, say) as lease:
        folder = working_folder(root)
        shutil.rmtree(folder, ignore_errors=True)
        fetch_small_files(root, folder)
        mirror = Mirror(folder, root, lease)
        try:
            yield Home(root, folder, lease)
        finally:
            mirror.close()


def working_folder(root: Path) -> Path:
    """Return the folder of this machine for the growing files of a run at a URL."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "worldloom" / hashlib.sha256(str(root).encode()).hexdigest()[:12] / root.name


def fetch_small_files(root: Path, folder: Path) -> None:
    """Copy all files of a run but its checkpoints, and those of its process, to a folder of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(files_below(root), key=lambda name: name == SUMMARY)  # it counts if it is the newest
    for name in names:
        if name != LEASE and not _passing(name) and not name.startswith(f"{CHECKPOINTS}/"):
            download(root / name, folder / name)


class Mirror:
    """Copies the files of a folder to an object store, in a thread, whenever they have changed."""

    def __init__(self, folder: Path, root: Path, lease: Lease) -> None:
        self._folder, self._root, self._lease = folder, root, lease
        self._sent = {name: self._state(name) for name in files_below(folder)}
        self._failed, self._ended = False, threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Copy what has changed once more."""
        self._ended.set()
        self._thread.join()
        self._copy()

    def _run(self) -> None:
        while not self._ended.wait(MIRROR_SECONDS):
            self._copy()

    def _copy(self) -> None:
        """Copy what has changed. The first failure is logged; the next call tries again."""
        try:
            self._lease.check()
            for name in files_below(self._folder):
                if not _passing(name) and (state := self._state(name)) != self._sent.get(name):
                    upload(self._folder / name, self._root / name)
                    self._sent[name] = state
            self._failed = False
        except (OSError, RuntimeError) as error:  # RuntimeError: LeaseLost, which ends the run elsewhere
            if not self._failed:
                logger.warning("the metrics of this run are not copied to %s for now: %s", self._root, error)
            self._failed = True

    def _state(self, name: str) -> tuple[int, int]:
        about = (self._folder / name).stat()
        return about.st_size, about.st_mtime_ns


def _passing(name: str) -> bool:
    """Return True for files of this machine only: locks, and what is being written."""
    last = name.rsplit("/", 1)[-1]
    return last.startswith(".") or last.endswith(PARTIAL)
