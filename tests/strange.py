"""Damage to files, for tests of what readers do with files from strangers."""

import os
import tracemalloc
import zipfile

from hypothesis import settings
from hypothesis import strategies as st


def fuzz(examples):
    """Settings of a test that draws the same examples in every run."""
    return settings(derandomize=True, deadline=None, max_examples=examples)


def outcome(read, path):
    """Return the result of `read` and "", or None and the ValueError's message, a sentence about the file."""
    try:
        return read(path), ""
    except ValueError as error:
        message = str(error)
    assert str(path) in message
    assert 20 < len(message) - len(str(path)) < 1500
    return None, message


@st.composite
def damaged(draw, whole):
    """Bytes that are not `whole`, or by chance the same: cut, flipped, swapped, overwritten, repeated or empty."""
    place, data = st.integers(0, len(whole) - 1), bytearray(whole)
    kind = draw(st.sampled_from(["cut", "flip", "swap", "fill", "insert", "empty"]))
    if kind == "cut":
        return whole[: draw(place)]
    if kind == "flip":
        for at in draw(st.lists(place, min_size=1, max_size=4)):
            data[at] ^= draw(st.integers(1, 255))
    elif kind in ("swap", "fill", "insert"):
        first, second, size = draw(place), draw(place), draw(st.integers(1, 512))
        block = whole[second : second + size] if kind != "fill" else bytes([draw(st.integers(0, 255))]) * size
        if kind == "swap":
            data[second : second + size] = whole[first : first + size]
        data[first : first + (size if kind != "insert" else 0)] = block
    return bytes(data) if kind != "empty" else b""


def refusal_of_bomb(read, path):
    """The message with which a small file is refused that asks for much; asserts that Python allocated little more than
    the file has."""
    size = os.path.getsize(path)
    assert size < 1_000_000
    tracemalloc.start()  # numpy's arrays count, torch's tensors do not
    try:
        _, message = outcome(read, path)
        assert tracemalloc.get_traced_memory()[1] < 4 * size + 2_000_000
    finally:
        tracemalloc.stop()
    return message


def repack(source, target, change):
    """Write a zip file again; change(archive, entry, content) writes each of its entries."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            change(new, entry.filename, old.read(entry))
    return target
