"""The first line of a command, printed before its imports, which take seconds."""

from __future__ import annotations

import os
from collections.abc import Sequence

STORAGE, JOB = "WORLDLOOM_STORAGE", "RAY_JOB_CONFIG_JSON_ENV_VAR"  # as in launch/places.py, which imports more


def say_what_starts(what: str, argv: Sequence[str]) -> None:
    """Say what is being started, from the arguments as they stand; nothing for --help."""
    if any(word == "-h" or word.startswith(("--help", "--print")) for word in argv):
        return
    place = _value(argv, "--run-dir", " in ") or _value(argv, "--name", " as ") + _value(argv, "--storage", " in ")
    if " in " not in place and JOB in os.environ:
        place += f" in {os.environ.get(STORAGE) or '~/worldloom/runs'}"
    begun = _value(argv, "--from", " from ")
    print(f"{what}{_value(argv, '--config', ' of ')}{begun}{place}: loading …", flush=True)


def _value(argv: Sequence[str], option: str, before: str) -> str:
    """Return the value of an option after `before`; nothing if the option is not given."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == option:
            return before + (value if equals else following)
    return ""
