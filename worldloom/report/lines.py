"""The lines of metrics.jsonl as a run stands: without those that a kill made void."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

RESUMED_AT = "resumed_at"  # in the first line after a resume: the environment steps of its checkpoint


def current_lines(texts: Iterable[str]) -> list[dict[str, Any]]:
    """Return the lines, read. Left out are lines that were cut short, and those of steps that a killed run had made
    since the checkpoint from which it was resumed: it made these steps again."""
    lines: list[dict[str, Any]] = []
    for text in texts:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if RESUMED_AT in line:
            lines = [earlier for earlier in lines if earlier.get("env_steps", 0) <= line[RESUMED_AT]]
        lines.append(line)
    return lines
