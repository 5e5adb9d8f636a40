"""The completion command: worldloom completion bash > ~/.local/share/bash-completion/completions/worldloom"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any, get_args, get_origin

from worldloom.command import commands
from worldloom.extras import how_to_install
from worldloom.families import FAMILIES, config_fields

CHECKOUT = Path(__file__).resolve().parent.parent
FILES, FOLDERS = ("config", "out", "video"), ("run_dir",)  # options that take names of files and of folders
DESCRIPTION = """Print a script that completes `worldloom` and its options. For bash: worldloom completion bash
> ~/.local/share/bash-completion/completions/worldloom, then open a new shell."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch.completion", description=DESCRIPTION)
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    shell = parser.parse_args(argv).shell
    try:
        import shtab
    except ModuleNotFoundError:
        print(f"launch.completion: {how_to_install('shtab')}", file=sys.stderr)
        return 1
    print(shtab.complete(whole_parser(), shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """Return a parser of all commands, for shtab alone. A command without a function `command_parser` completes its
    name only."""
    whole = argparse.ArgumentParser(prog="worldloom")
    branches = whole.add_subparsers()
    for name, what in commands(CHECKOUT).items():
        branch = branches.add_parser(name, help=what, description=what)
        make = getattr(importlib.import_module(f"launch.{name}"), "command_parser", None)
        for action in make()._actions if make else []:
            if action.option_strings and action.help != argparse.SUPPRESS and "--help" not in action.option_strings:
                _copy(action, branch)
    return whole


def _copy(action: Any, branch: argparse.ArgumentParser) -> None:
    """Add an option of a command to the branch, with what its values are completed from."""
    import shtab

    if action.option_strings == ["--agent"]:
        fields = {field.name for name, f in FAMILIES.items() for field in config_fields(f"{name}:{f.default_size}")}
        for field in sorted(fields):
            branch.add_argument(f"--agent.{field}")
        return
    if action.nargs == 0:
        branch.add_argument(*action.option_strings, action="store_true")
        return
    added: Any = branch.add_argument(*action.option_strings, choices=_choices(action))
    if action.dest in FILES:
        added.complete = shtab.FILE
    elif action.dest in FOLDERS:
        added.complete = shtab.DIRECTORY


def _choices(action: Any) -> list[str] | None:
    """Return the words that an option takes, if there are only a few."""
    if action.choices:
        return [str(choice) for choice in action.choices]
    hint = getattr(action, "_typehint", None)
    if hint is bool:
        return ["true", "false"]
    return [str(value) for value in get_args(hint)] if str(get_origin(hint)).endswith("Literal") else None


if __name__ == "__main__":
    sys.exit(main())
