"""Locations of files: folders of this machine, or object stores that fsspec reaches by URL (s3://, gs://)."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

PARTIAL = ".partial"  # suffix of files and folders that are not complete

Location = str | os.PathLike[str]


def locate(where: Location) -> Path:
    """Return a folder or file of this machine, or of an object store: `universal_pathlib` gives that the same methods.

    Raises ValueError for a URL that nothing installed can read.
    """
    if not isinstance(where, str | os.PathLike):
        return where
    text = os.fspath(where)
    if "://" not in text:
        return Path(text)
    if text.startswith("file://"):
        return Path(url2pathname(urlsplit(text).path))
    try:
        from upath import UPath

        place: Any = UPath(text, use_listings_cache=False)  # others write there, too
        place.fs  # noqa: B018 - loads the library of this protocol
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{text} cannot be used: {error}. Install what reads it: pip install 'worldloom[storage]' for s3://, gcsfs "
            "for gs://, adlfs for az://."
        ) from error
    return cast(Path, place)


def local_folder(where: Location) -> Path:
    """Return a folder or file of this machine, to write to. Raises ValueError for an object store."""
    place = locate(where)
    if is_remote(place):
        raise ValueError(f"{where} is a URL, expected a place on this machine. Write there, and copy it to the store.")
    return place


def is_remote(place: Path) -> bool:
    return not isinstance(place, Path)


@contextlib.contextmanager
def as_os_errors(place: Path) -> Iterator[None]:
    """Raise what an object store's library raises as OSError, as a disk would."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if is_remote(place):
            raise OSError(f"{place}: {type(error).__name__}: {error}") from error
        raise


def join(folder: Path, name: str) -> Path:
    """Return folder / name for a name that may begin with "../", which object stores do not resolve."""
    while name.startswith("../"):
        folder, name = folder.parent, name[3:]
    return folder / name


def read_bytes(path: Path) -> bytes:
    """Read a file. From an object store in one request, so that it is never half old and half new."""
    with as_os_errors(path):
        return cast(bytes, _store(path).cat_file(_key(path))) if is_remote(path) else path.read_bytes()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file completely or not at all; its folder exists. Raises OSError."""
    if is_remote(path):  # object stores show an object only when all of it is there
        with as_os_errors(path):
            path.write_bytes(data)
        return
    partial = path.with_suffix(PARTIAL)
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def find(folder: Path, pattern: str) -> list[Path]:
    """Return what matches a glob pattern, sorted; [] if the folder does not exist."""
    with as_os_errors(folder):
        return sorted(folder.glob(pattern)) if folder.is_dir() else []


def is_file(path: Path) -> bool:
    with as_os_errors(path):
        return path.is_file()


def make_folder(folder: Path) -> None:
    """Make a folder of this machine, with its parents; in an object store there are none to make."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def remove_file(path: Path) -> None:
    """Remove a file, if it exists."""
    with as_os_errors(path):
        path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder and what is in it, as far as possible."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with as_os_errors(folder), contextlib.suppress(FileNotFoundError):
        _store(folder).rm(_key(folder), recursive=True)


def download(source: Path, target: Path) -> None:
    """Copy a file to a file of this machine, completely or not at all, and make its folder."""
    make_folder(target.parent)
    partial = target.with_name(target.name + PARTIAL)
    if is_remote(source):
        with as_os_errors(source):
            _store(source).get_file(_key(source), str(partial))
    else:
        shutil.copyfile(source, partial)
    partial.replace(target)


def upload(source: Path, target: Path) -> None:
    """Copy a file of this machine to an object store, in parts if it is large."""
    with as_os_errors(target):
        _store(target).put_file(str(source), _key(target))


def files_below(folder: Path) -> dict[str, int]:
    """Return path relative to the folder -> bytes, of all files below it; {} if it does not exist."""
    with as_os_errors(folder):
        if not is_remote(folder):
            return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        root = _key(folder).rstrip("/")
        found = _store(folder).find(root, detail=True)
        return {name[len(root) :].lstrip("/"): int(about["size"]) for name, about in found.items()}


def _store(place: Path) -> Any:
    return cast(Any, place).fs


def _key(place: Path) -> str:
    return str(cast(Any, place).path)


@contextlib.contextmanager
def on_disk(place: Path) -> Iterator[Path]:
    """Give a file or a folder on this machine: itself, or a copy of an object store's until the end."""
    if not is_remote(place):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="worldloom-") as folder:
        local = Path(folder) / place.name
        names = [""] if is_file(place) else files_below(place)
        for name in names:
            download(place / name if name else place, local / name)
        yield local
