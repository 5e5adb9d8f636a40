"""Saving replay: its state for a checkpoint that keeps the rows apart, or everything in one file."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.encoding import pack, unpack
from worldloom.replay.chunk import Ledger, with_seam
from worldloom.replay.ring import Ring
from worldloom.types import Array

FORMAT = 1  # version of saved buffers


def take_state(ring: Ring, ledger: Ledger, rng: np.random.Generator) -> dict[str, Any]:
    """Return everything but the rows themselves.

    The starts of windows follow from the rows. Their order, which draws depend on, does not; so it becomes that of the
    ring here and in `restore`, and a buffer that goes on draws the same as one that is restored.
    """
    ring.index.sort()
    return {
        "rows": ring.rows,
        "begin": ring.oldest,
        "steps": ring.steps,
        "episodes": ring.episodes,
        "chunks": ledger.chunks,
        "duplicates": ledger.duplicates,
        "sequence": [[actor, *last] for actor, last in ledger.newest.items()],
        "online": list(ring.fresh),
        "rng": rng.bit_generator.state,
        "specs": {name: [list(s.shape), s.dtype] for name, s in ring.specs.items()},
    }


def restore(
    ring: Ring,
    ledger: Ledger,
    rng: np.random.Generator,
    state: Mapping[str, Any],
    segments: Iterable[Mapping[str, Array] | None],
    rows: int,
    lost: int,
) -> None:
    """Restore what `take_state` returned, from segments of consecutive rows; see `ReplayBuffer.load_state_dict`.

    Raises ValueError if the columns differ or rows are missing.
    """
    expected = {name: [list(s.shape), s.dtype] for name, s in ring.specs.items()}
    if state["specs"] != expected:
        raise ValueError(f"the checkpoint's replay has columns {state['specs']}, expected {expected}.")
    held = min(state["rows"] - state.get("begin", 0), ring.capacity)
    if rows + lost < held:
        raise ValueError(f"the checkpoint holds {rows} rows of replay, expected {held}.")
    ring.clear()
    ring.rows = ring.begin = int(state["rows"]) - rows
    restarted: set[tuple[int, int]] | None = None  # streams whose first row after a gap was appended
    for segment in segments:
        if segment is None:
            ring.forget_streams()
            restarted = set()
        else:
            _append(ring, segment, restarted)
    ring.steps, ring.episodes = int(state["steps"]), int(state["episodes"])
    ledger.chunks, ledger.duplicates = int(state["chunks"]), int(state["duplicates"])
    ledger.newest = {actor: (incarnation, sequence) for actor, incarnation, sequence in state["sequence"]}
    ring.index.sort()
    ring.fresh.clear()
    ring.fresh.extend(state["online"] if restarted is None else ())
    rng.bit_generator.state = state["rng"]


def _append(ring: Ring, segment: Mapping[str, Array], restarted: set[tuple[int, int]] | None) -> None:
    """Append saved rows, one run of rows of a single stream after the other. After a gap, the first row of each stream
    becomes an is_first row, because the row before it is lost."""
    origin = segment["origin"]
    if not len(origin):
        return
    cuts = np.flatnonzero((origin[1:] != origin[:-1]).any(1)) + 1
    for begin, end in pairwise([0, *cuts.tolist(), len(origin)]):
        run = {name: segment[name][begin:end] for name in ring.specs}
        stream = (int(origin[begin][0]), int(origin[begin][1]))
        if restarted is not None and stream not in restarted:
            run = with_seam(run)
            restarted.add(stream)
        ring.append(stream, run)


def write_buffer(path: str | os.PathLike[str], about: Mapping[str, Any], columns: Mapping[str, Array]) -> None:
    """Write one npz file, completely or not at all; no entry is pickled."""
    final = Path(path)
    partial = final.with_name(final.name + ".partial")
    described = np.frombuffer(pack({"format": FORMAT, **about}), np.uint8)
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, about=described, **columns)
    partial.replace(final)


def read_buffer(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read what `write_buffer` wrote. Raises ValueError for a file of another kind, or one that is cut short."""
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
        about: dict[str, Any] = unpack(columns.pop("about").tobytes())
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no replay buffer, expected a file that ReplayBuffer.save wrote.") from error
    if about["format"] > FORMAT:
        raise ValueError(f"{path} is of format {about['format']}, expected at most {FORMAT}. Update WorldLoom.")
    return about, columns
