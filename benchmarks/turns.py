"""References timed side by side on one GPU: warm-up and compilation run at once, timed calls one program at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def turn(options: dict[str, Any]) -> Iterator[None]:
    """Holds the lock file named by the option "lock", if there is one."""
    if "lock" not in options:
        yield
        return
    with open(options["lock"], "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
