"""Suggestions for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

CLOSE = 0.75  # difflib's ratio: a letter or two of a word; below it, a suggestion only confuses


def nearest(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """Return the known names that are nearly `name`, the nearest first; none if the distance is not small."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=CLOSE)
