"""Saving replay: its state for a checkpoint that keeps the rows apart, or everything in one file."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.archive import UNREADABLE, explain, read_entries
from worldloom.encoding import pack, unpack
from worldloom.replay.chunk import Ledger, with_seam
from worldloom.replay.ring import Ring
from worldloom.types import Array, join_obs, split_obs

FORMAT = 2  # version of saved buffers; 1 also stores the starts of windows
NPY_HEADER = 2**16  # more than the bytes before an array's numbers in an npz file


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
    sequence = np.asarray(state["sequence"], np.int64).reshape(-1, 3)
    ledger.newest = {actor: (incarnation, last) for actor, incarnation, last in sequence.tolist()}
    ring.index.sort()
    ring.fresh.clear()
    online = np.asarray(state["online"] if restarted is None else (), np.int64)
    ring.fresh.extend(online[(online < ring.rows) & ring.index.holds(online % ring.capacity)].tolist())
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
    """Read what `write_buffer` wrote: its description, and its columns as views of the file.

    Raises ValueError for a file of another kind, one that is cut short, or one whose parts contradict each other.
    """
    entries = read_entries(path, "no replay buffer")
    try:
        columns = {name.removesuffix(".npy"): _read_array(content) for name, content in entries.items()}
        about: dict[str, Any] = unpack(columns.pop("about").tobytes())
        if about["format"] > FORMAT:
            raise ValueError(f"it is of format {about['format']}, expected at most {FORMAT}. Update WorldLoom")
        _check_saved(about, columns)
    except UNREADABLE as error:
        raise ValueError(f"{path} is no replay buffer that ReplayBuffer.save wrote: {explain(error)}.") from error
    return about, columns


def _read_array(content: memoryview) -> Array:
    """Return an entry of an npz file, which np.load would allocate before it looks for the bytes."""
    head = io.BytesIO(content[:NPY_HEADER])
    version = np.lib.format.read_magic(head)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(head)
    if fortran or dtype.kind not in "biuf":
        raise ValueError(f"an array has dtype {dtype}, expected numbers in C order")
    return np.frombuffer(content, dtype, offset=head.tell()).reshape(shape)


def _check_saved(about: Mapping[str, Any], columns: Mapping[str, Array]) -> None:
    """Check a description against the columns, before anything of the sizes that it claims is made."""
    state, windows, rows = about["state"], about["windows"], len(columns["rewards"])
    specs = {**state["specs"], "origin": [[2], "int32"]}
    if columns.keys() != specs.keys() or not split_obs(join_obs(state["specs"])):
        raise ValueError(f"it has columns {sorted(columns)}, expected {sorted(specs)}")
    for name, (shape, dtype) in specs.items():
        column = columns[name]
        if column.shape != (rows, *shape) or column.dtype != np.dtype(dtype):
            raise ValueError(f"column {name!r} is {column.dtype} {column.shape}, expected {dtype} {(rows, *shape)}")
        if column.dtype.kind == "f" and not np.isfinite(column).all():
            raise ValueError(f"column {name!r} holds NaN or infinity, expected finite numbers")
        if column.dtype.kind == "b" and (column.view(np.uint8) > 1).any():
            raise ValueError(f"column {name!r} holds other bytes than 0 and 1, expected truth values")
    begin, accepted, capacity = state.get("begin", 0), state["rows"], about["capacity"]
    for name, number, low, high in (
        ("capacity", capacity, max(rows, 1), None),
        ("action_dim", about["action_dim"], 1, None),
        ("windows.length", windows["length"], 1, capacity),
        ("windows.context", windows["context"], 0, windows["length"]),
        ("rows", accepted, rows, None),
        ("begin", begin, 0, accepted),
        ("steps", state["steps"], 0, accepted),
        ("episodes", state["episodes"], 0, accepted),
        ("chunks", state["chunks"], 0, None),
        ("duplicates", state["duplicates"], 0, None),
    ):
        if type(number) is not int or number < low or (high is not None and number > high):
            limit = "" if high is None else f" to {high}"
            raise ValueError(f"{name} is {number!r:.80}, expected a whole number from {low}{limit}")
    if accepted - max(begin, accepted - capacity) != rows:
        raise ValueError(f"it holds {rows} rows, expected those from {begin} to {accepted}")
