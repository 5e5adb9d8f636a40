"""A msgpack format with raw buffers for arrays: nested dicts and lists of numbers, text, numpy arrays and tensors.

It uses no pickle.
"""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import torch

ARRAY, TENSOR, BIG_INTEGER = 1, 2, 3
TORCH_ERRORS = (AttributeError, RuntimeError)  # of a dtype or size that does not exist


def pack(value: Any) -> bytes:
    """Encode a value as bytes. Raises TypeError for objects of other kinds."""
    packed: bytes = msgpack.packb(value, default=_encode, use_bin_type=True)
    return packed


def unpack(data: bytes) -> Any:
    """Decode what `pack` encoded: arrays as writable copies, tensors on the CPU, tuples as lists.

    Raises ValueError for other data.
    """
    try:
        return msgpack.unpackb(data, ext_hook=_decode, strict_map_key=False, raw=False)
    except (msgpack.UnpackException, ValueError, TypeError, LookupError, OverflowError, *TORCH_ERRORS) as error:
        raise ValueError(f"not a complete WorldLoom msgpack file: {error}") from error


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        return msgpack.ExtType(ARRAY, pack([array.dtype.str, list(value.shape), array.tobytes()]))
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()  # numpy has no bfloat16
        return msgpack.ExtType(TENSOR, pack([str(tensor.dtype).removeprefix("torch."), list(tensor.shape), raw]))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, int):  # beyond 64 bits, as in the state of numpy's generators
        return msgpack.ExtType(BIG_INTEGER, str(value).encode())
    raise TypeError(f"{type(value).__name__} cannot be saved, expected numbers, text, arrays, tensors, dicts or lists.")


def _decode(code: int, data: bytes) -> Any:
    if code == BIG_INTEGER:
        return int(data)
    dtype, shape, raw = unpack(data)
    if code == ARRAY:
        return np.frombuffer(raw, dtype=np.dtype(dtype)).reshape(shape).copy()
    if code == TENSOR:
        flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
        return flat.view(getattr(torch, dtype)).reshape(shape)
    raise ValueError(f"unknown extension type {code}")
