"""Fields with several values on the command line, and every combination of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence, Set

RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(\d+))?")
OPENING, CLOSING, QUOTES = "[{(", "]})", "'\""
Axes = dict[str, list[str]]  # the values of each field that has several, as texts


def take_axes(argv: Sequence[str], own: Set[str] = frozenset()) -> tuple[list[str], Axes]:
    """Return the arguments without the fields that have several values, and these values.

    own: options of the sweep itself, whose values are not split. Raises ValueError for an empty value or a wrong range.
    """
    rest: list[str] = []
    axes: Axes = {}
    words = iter(argv)
    for word in words:
        key, equals, value = word.partition("=")
        name = key.removeprefix("--")
        if not key.startswith("--") or name in own or name.startswith("search"):
            rest.append(word)
            continue
        if not equals:
            value = next(words, "")
        if len(values := values_of(value, key)) > 1:
            axes[name] = values
        else:
            rest += [f"{key}={values[0]}"] if equals else [key, *([values[0]] if value else [])]
    return rest, axes


def values_of(text: str, key: str = "") -> list[str]:
    """Return the values that `a,b` or `0..4` lists; `0..8..2` takes every second.

    Commas inside brackets or quotes belong to a value; quotes around a whole value are removed.
    """
    parts = split(text)
    if len(parts) > 1 and not all(part.strip() for part in parts):
        raise ValueError(f"{key} is {text!r}: one of its values is empty. Write a,b,c without a comma at the end.")
    found = [value for part in parts for value in _expand(part.strip(), key)]
    return list(dict.fromkeys(found))


def split(text: str) -> list[str]:
    """Split at the commas that are outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in QUOTES:
            quote = letter
        depth += (letter in OPENING) - (letter in CLOSING) if not quote else 0
        if letter == "," and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _expand(part: str, key: str) -> list[str]:
    if len(part) >= 2 and part[0] in QUOTES and part[-1] == part[0]:
        return [part[1:-1]]
    if not (match := RANGE.fullmatch(part)):
        return [part]
    first, last, step = int(match[1]), int(match[2]), int(match[3] or 1)
    if last < first or step < 1:
        raise ValueError(f"{key} is {part!r}, expected a range that goes up, such as 0..4 or 0..8..2.")
    return [str(number) for number in range(first, last + 1, step)]


def combinations(axes: Axes) -> list[dict[str, str]]:
    """Return every combination of the values; the last field varies fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def run_names(points: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a name for each combination, which is a good file name: id-Pendulum-v1_seed-0."""
    fields = list(points[0]) if points else []
    last = [field.rpartition(".")[2] for field in fields]
    short = [name if last.count(name) == 1 else field for field, name in zip(fields, last, strict=True)]
    names = ["_".join(f"{name}-{_slug(point[f])}" for f, name in zip(fields, short, strict=True)) for point in points]
    if len(set(names)) < len(names):  # two values differ in letters that a file name lacks
        names = [f"{i}_{name}" for i, name in enumerate(names)]
    return names


def _slug(value: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", value).strip("-.") or "empty"
