"""The origin of the results of a run: the command, the versions and the commit."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "numpy", "gymnasium", "ray")
GIT_SECONDS = 10.0


def origin() -> dict[str, str]:
    """Return the command that runs, the versions of what it uses and, in a checkout, its commit."""
    found = {"command": command(), "versions": versions()}
    return found | ({"commit": told} if (told := commit()) else {})


def command() -> str:
    """Return the command line of this process as a person would type it."""
    program, *arguments = sys.argv
    path = Path(program)
    if path.parent.name in ("launch", "benchmarks"):
        program = f"python -m {path.parent.name}.{path.stem}"
    elif path.suffix == ".py":
        program = f"python {program}"
    return " ".join([program, *map(shlex.quote, arguments)])


def versions() -> str:
    """Return the versions of Python, of this library and of the packages that shape its results."""
    known = {"Python": platform.python_version(), "worldloom": _version("worldloom")}
    used = {name: _version(name) for name in PACKAGES if name in sys.modules}
    return ", ".join(f"{name} {version}" for name, version in (known | used).items() if version)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(folder: Path = CHECKOUT) -> str | None:
    """Return the commit of a checkout, and whether files differ from it; None without git or a repository."""
    if not (folder / ".git").exists():
        return None
    try:
        last = _git(folder, "rev-parse", "HEAD")
        return f"{last}, with changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else last
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    ran = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=GIT_SECONDS
    )
    return ran.stdout.strip()
