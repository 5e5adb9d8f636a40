"""Errors as a sentence for the person at the terminal."""

from __future__ import annotations

import contextlib
import errno
import traceback
from pathlib import Path

from worldloom.extras import missing_extra

CHOOSE = "Choose another place."
WHAT = {
    errno.EEXIST: f"is a file, expected a folder. {CHOOSE}",
    errno.ENOTDIR: f"lies in a file, expected a folder. {CHOOSE}",
    errno.EISDIR: f"is a folder, expected a file. {CHOOSE}",
    errno.EACCES: f"cannot be used: permission denied. {CHOOSE}",
    errno.EROFS: f"cannot be written: the file system is read-only. {CHOOSE}",
    errno.ENOSPC: "cannot be written: the disk is full. Free some space.",
    errno.ENOENT: "does not exist.",
}


def sentence(error: BaseException) -> str:
    """Return what an error says, without numbers of the operating system; a missing package names its extra."""
    if isinstance(error, OSError) and error.errno in WHAT and error.filename is not None:
        return f"{error.filename} {WHAT[error.errno]}"
    if isinstance(error, ImportError) and (hint := missing_extra(error)):
        return hint
    return str(error)


def keep_traceback(error: BaseException, path: Path) -> bool:
    """Write where an error came from, in actors too, to a file; return whether this was possible."""
    with contextlib.suppress(OSError):
        path.write_text("".join(traceback.format_exception(error)))
        return True
    return False
