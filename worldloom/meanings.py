"""The meanings of the fields of a config: from the docstring's Args, or the comments beside the fields."""

from __future__ import annotations

import inspect
import re
from typing import Any


def meanings(config: type[Any]) -> dict[str, str]:
    """Return a sentence for each field of a dataclass that has one; the docstring goes before a comment."""
    return {**_comments(config), **_arguments(config)}


def _arguments(config: type[Any]) -> dict[str, str]:
    text = inspect.getdoc(config) or ""
    found: dict[str, str] = {}
    last = ""
    for line in text.partition("Args:\n")[2].splitlines():
        match = re.match(r"    (\w+): (.*)", line)
        if match:
            last = match[1]
            found[last] = match[2]
        elif last and line.strip():
            found[last] += " " + line.strip()
    return found


def _comments(config: type[Any]) -> dict[str, str]:
    try:
        source = inspect.getsource(config)
    except (OSError, TypeError):  # of a family that comes without its source
        return {}
    return dict(re.findall(r"^    (\w+): [^\n#]*#\s*(.+)$", source, re.MULTILINE))
