"""The console command `worldloom NAME …`: it runs the command launch.NAME of a checkout, as python -m launch.NAME does.

The package holds the library alone, so `launch` is looked for in the current folder, and in the checkout from which
worldloom was installed in editable mode.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from worldloom.nearest import nearest

COMMANDS = {
    "train": "train an agent, or go on with a run",
    "evaluate": "play episodes with a trained agent, and film them",
    "imagine": "show what a trained world model imagines",
    "status": "print the status of a run",
    "runs": "list runs, and copy one here",
    "sweep": "train several configurations or seeds",
    "compare": "compare runs on one page",
    "dashboard": "write boards and scrape files for Grafana and Prometheus",
    "completion": "print a script that completes these commands in bash, zsh or tcsh",
}
COMMAND = "WORLDLOOM_COMMAND"  # set in the environment of commands that were started as `worldloom NAME`
NO_CHECKOUT = (
    "worldloom: this command is part of a checkout of WorldLoom, and there is none here. Run it in the folder of a "
    "checkout, or install worldloom from one with: pip install -e '.[training]'"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command in place of this process; return 2 for a command that is not there."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    checkout = find_checkout()
    known = commands(checkout)
    if name in ("-h", "--help", "help"):
        print(_help(known, checkout))
        return 0
    if name == "--version":
        print(f"worldloom {importlib.metadata.version('worldloom')}")
        return 0
    if checkout is None and name in COMMANDS:
        print(NO_CHECKOUT, file=sys.stderr)
        return 2
    if checkout is None or name not in known:
        near = nearest(name, known)
        hint = f"Did you mean {near[0]}?" if near else f"Expected one of: {', '.join(known)}."
        print(f"worldloom: there is no command {name!r}. {hint}", file=sys.stderr)
        return 2
    paths = [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")]), os.getcwd()]  # the last: own environments
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), COMMAND: name}
    sys.stdout.flush()
    return os.execve(sys.executable, [sys.executable, "-P", "-m", f"launch.{name}", *rest], environment)


def find_checkout() -> Path | None:
    """Return the folder of a checkout: the current one, or the one around this file."""
    for folder in (Path.cwd(), Path(__file__).resolve().parent.parent):
        if all(PathFinder.find_spec(name, [str(folder)]) for name in ("launch", "distributed", "worldloom")):
            return folder
    return None


def commands(checkout: Path | None) -> dict[str, str]:
    """Return the commands that this checkout has, with what they do; without a checkout, those that one may have."""
    if checkout is None:
        return COMMANDS
    files = {name: checkout / "launch" / f"{name}.py" for name in COMMANDS}
    return {
        name: COMMANDS[name] for name, file in files.items() if file.is_file() and "\ndef main(" in file.read_text()
    }


def _help(known: dict[str, str], checkout: Path | None) -> str:
    lines = ["usage: worldloom COMMAND [options]", ""]
    lines += [f"  {name:<12}{what}" for name, what in known.items()]
    lines += ["", "worldloom COMMAND --help shows the options of a command. python -m launch.COMMAND does the same."]
    return "\n".join(lines if checkout else [*lines, "", NO_CHECKOUT.removeprefix("worldloom: ")])


if __name__ == "__main__":
    sys.exit(main())
