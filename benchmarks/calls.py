"""The calls that made a page: each command with the machine that ran it, kept beside the runs."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

CALLS = "calls.txt"


def machine() -> str:
    """Return the processor, its cores, the GPU and torch, as a page names them."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpu = f"{torch.cuda.get_device_name(0)}, " if torch.cuda.is_available() else ""
    return f"{gpu}{os.cpu_count()} cores of {(names or [platform.machine()])[0]}, torch {torch.__version__}"


def note_call(out: Path, program: str, argv: Sequence[str], places: Mapping[str, str]) -> None:
    """Keep a command and this machine in the folder. places: what stands for the value of an option that is a path."""
    words = [places.get(before, word) for before, word in zip(["", *argv], argv, strict=False)]
    line = f"`{shlex.join(['python', '-m', program, *words])}` on {machine()}"
    known = read_calls(out)
    if line not in known:
        out.mkdir(parents=True, exist_ok=True)
        (out / CALLS).write_text("".join(f"{each}\n" for each in [*known, line]))


def read_calls(out: Path) -> list[str]:
    """Return the calls that trained what is in the folder, oldest first."""
    return (out / CALLS).read_text().splitlines() if (out / CALLS).is_file() else []
