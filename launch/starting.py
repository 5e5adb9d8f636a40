"""What a command says before its imports, which take seconds."""

from __future__ import annotations

from collections.abc import Sequence


def say_what_starts(what: str, argv: Sequence[str]) -> None:
    """Say what is being started, from the arguments as they stand; nothing for --help."""
    if any(word == "-h" or word.startswith(("--help", "--print")) for word in argv):
        return
    print(f"{what}{_value(argv, '--config', ' of ')}{_value(argv, '--run-dir', ' in ')}: loading …", flush=True)


def _value(argv: Sequence[str], option: str, before: str) -> str:
    """Return the value of an option after `before`; nothing if the option is not given."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == option:
            return before + (value if equals else following)
    return ""
