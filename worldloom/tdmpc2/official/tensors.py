"""Files of torch.save, read as what they are: a pickle that names tensors, and the tensors' bytes.

torch.load(weights_only=True) executes nothing in a file either, but it allocates what the file claims, and does not
compare checksums. Here nothing that a file names is imported or called, and tensors are views of the file.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import pickletools
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from worldloom.archive import UNREADABLE, explain, read_entries

DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
PLAIN, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
OTHERS = {
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, which has no values",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
}
PICKLE_BYTES = 2**18  # more than ten times that of the largest published file
TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
PAIR = ("BINFLOAT", "BINFLOAT", "TUPLE2")  # the opcodes that make a tuple of two floats
MADE = ("BINUNICODE", "EMPTY_DICT", "EMPTY_LIST", "GLOBAL", "NEWOBJ", "REDUCE", *TUPLES)  # then torch.save numbers it
OPCODES = (  # all that torch.save writes for tensors, numbers, text, dicts and lists
    *MADE, "APPEND", "APPENDS", "BINFLOAT", "BINGET", "BININT", "BININT1", "BININT2", "BINPERSID", "BINPUT", "BUILD",
    "EMPTY_TUPLE", "LONG1", "LONG_BINGET", "LONG_BINPUT", "MARK", "NEWFALSE", "NEWTRUE", "NONE", "PROTO", "SETITEM",
    "SETITEMS", "STOP",
)  # fmt: skip
NAME_LENGTH = 200  # more than any tensor's name has, so that messages stay short
AXES = 8  # more than any tensor of a model or of episodes has
SHARED = 4  # tensors may share bytes, as the value heads do with their detached copy: twice, in some files three times


class Named:
    """Stands for an object that a file would make: its class has the name of what would be called, with `args`."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Named:
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class TensorFile:
    """A file of torch.save: `content`, where tensors and all other objects but dicts, lists and numbers are `Named`.

    verdict: what the file is if it cannot be read; see `read_entries`. Raises ValueError, FileNotFoundError.
    """

    def __init__(self, path: str | os.PathLike[str], verdict: str) -> None:
        self.path = path
        self._bytes = os.path.getsize(path)
        entries = read_entries(path, verdict)
        roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1 or bytes(entries.get(roots[0] + "byteorder", b"little")) != b"little":
            raise ValueError(f"{path} is {verdict}: expected a file of torch.save, from a little-endian machine.")
        self._storages = {name.removeprefix(roots[0] + "data/"): content for name, content in entries.items()}
        try:
            self.content = _unpickle(bytes(entries[roots[0] + "data.pkl"]))
        except UNREADABLE as error:
            raise ValueError(f"{path} is {verdict}: {explain(error)}. Check where it comes from.") from error

    def tensors(self, found: Mapping[Any, Any]) -> dict[str, Tensor]:
        """Return the tensors of a part of `content`. Raises ValueError for what is not a dense tensor of real numbers
        that the file holds, by its name."""
        if not all(isinstance(name, str) and len(name) <= NAME_LENGTH for name in found):
            raise ValueError(f"{self.path} has a key that is no text or a long one, expected the names of tensors.")
        made = {name: self._tensor(name, value) for name, value in found.items()}
        claimed = sum(tensor.numel() * tensor.itemsize for tensor in made.values())
        if claimed > SHARED * self._bytes:
            raise ValueError(
                f"{self.path}: its tensors claim {claimed:,} bytes, expected at most {SHARED} times the "
                f"{self._bytes:,} of the file. Check where it comes from."
            )
        return made

    def _tensor(self, name: str, found: Any) -> Tensor:
        if _made_by(found) == PARAMETER and found.args:
            found = found.args[0]
        if (made_by := _made_by(found)) != PLAIN:
            what = OTHERS.get(made_by, f"of type {made_by[:80]}")
            raise self._refusal(name, f"is {what}, expected a dense tensor of real numbers")
        try:
            (_, storage, key, _, count), offset, shape, stride = found.args[:4]
            kind, content = storage.__name__, self._storages[key]
            whole = {type(number) for number in (count, offset, *shape, *stride)} == {int}
        except UNREADABLE:
            raise self._refusal(name, "is damaged, expected a tensor whose bytes are in the file") from None
        if kind not in DTYPES:
            what = "complex" if "Complex" in kind else kind[:80]
            raise self._refusal(name, f"is {what}, expected real numbers")
        if whole and 0 in shape:
            raise self._refusal(name, "is empty, expected numbers")
        size = DTYPES[kind].itemsize
        if not whole or not 1 <= count <= len(content) // size or len(shape) != len(stride) or len(shape) > AXES:
            raise self._refusal(name, "is damaged, expected a tensor whose bytes are in the file")
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if min((offset, *shape, *stride)) < 0 or last >= count:
            raise self._refusal(name, "reaches beyond its bytes in the file, expected a tensor within them")
        if math.prod(shape) * size > self._bytes:
            raise self._refusal(name, f"repeats its numbers to more bytes than the file has ({self._bytes:,})")
        raw = torch.frombuffer(content, dtype=torch.uint8, count=count * size)
        aligned = raw if raw.data_ptr() % size == 0 else raw.clone()
        return aligned.view(DTYPES[kind]).as_strided(shape, stride, offset)

    def _refusal(self, name: str, problem: str) -> ValueError:
        return ValueError(f"{self.path}: {name} {problem}. Check where the file comes from.")


def listed(names: Iterable[str]) -> str:
    """Return names for a message; a file can have thousands."""
    return textwrap.shorten(", ".join(sorted(names)), 300, placeholder=" …")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        return type(f"{module}.{name}", (Named,), {})

    def persistent_load(self, pid: Any) -> Any:
        """Return the tuple that describes a storage: ("storage", class, key, device, count)."""
        return pid


def _unpickle(pickled: bytes) -> Any:
    """Return the content of a pickle, in which nothing is imported. Raises errors of UNREADABLE."""
    if len(pickled) > PICKLE_BYTES:
        raise ValueError(f"its data.pkl has {len(pickled):,} bytes, expected at most {PICKLE_BYTES:,}")
    _check_pickle(pickled)
    return _Unpickler(io.BytesIO(pickled)).load()


def _check_pickle(pickled: bytes) -> None:
    """Raise ValueError for a pickle that torch.save does not write.

    Pickle would allocate a table up to the number that an object is given. A tuple of a tuple twice, of a tuple twice,
    and so on, has few bytes, but as a key of a dict it takes forever to hash: so no tuple is used again, but for two
    floats, such as the betas that all groups of an optimiser share.
    """
    before, tuples, last = "", set(), ("", "", "")
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name not in OPCODES:
            raise ValueError(f"its pickle has {opcode.name}, which torch.save does not write")
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            if before not in MADE or (number := int(argument or 0)) > len(pickled):
                raise ValueError(f"its pickle numbers an object {argument} in a way that torch.save does not")
            if before in TUPLES and last != PAIR:
                tuples.add(number)
        if opcode.name in ("BINGET", "LONG_BINGET") and argument in tuples:
            raise ValueError("its pickle uses a tuple again, which torch.save does not")
        before, last = opcode.name, (*last[1:], opcode.name)


def _made_by(found: Any) -> str:
    return type(found).__name__
