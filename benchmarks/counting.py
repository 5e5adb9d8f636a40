"""Counts what a call computes: operations of eager code, kernels of compiled code. Imports nothing of WorldLoom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FREE = ("empty", "new_empty", "detach", "lift_fresh", "_unsafe_view")  # operations that start no kernel, beside views
VIEWS = (
    "_reshape_alias", "alias", "as_strided", "chunk", "expand", "flatten", "narrow", "permute", "reshape", "resize_",
    "result_type", "select", "slice", "split", "squeeze", "t", "to", "transpose", "unbind", "unfold", "unsafe_split",
    "unsqueeze", "view",
)  # fmt: skip


class Counted(TorchDispatchMode):
    """Counts how often each operation is called that computes something."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        returned = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if not is_view and not name.startswith(FREE) and "profiler" not in func._schema.name:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def count_kernels(call: Callable[[], Any]) -> Counter[str]:
    """Count the kernels that a compiled call runs on a CPU: Inductor's own, and the outermost operations of torch.

    The call must have been compiled with `torch._inductor.config.cpp.enable_kernel_profile`.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    kernels: Counter[str] = Counter()
    for event in profile.events() or []:
        outer = event.cpu_parent is None or not event.cpu_parent.name.startswith("aten::")
        name = event.name.removeprefix("aten::")
        if event.name.startswith("graph_") or "cpp_fused" in event.name:
            kernels["fused"] += 1
        elif event.name.startswith("aten::") and outer and name not in VIEWS and not name.startswith(FREE):
            kernels[name] += 1
    return kernels
