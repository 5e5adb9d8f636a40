"""Counts what a call computes: operations of eager code, kernels of compiled code. Imports nothing of WorldLoom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FREE = ("empty", "new_empty", "detach", "lift_fresh", "_unsafe_view")  # operations that start no kernel, beside views
VIEWS = (
    "alias", "as_strided", "expand", "narrow", "permute", "reshape", "resize_", "result_type", "select", "slice",
    "split", "squeeze", "t", "to", "transpose", "unbind", "unfold", "unsafe_split", "unsqueeze", "view",
)  # fmt: skip


class Counted(TorchDispatchMode):
    """How often each operation is called that computes something."""

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
    """Count the kernels that a compiled call runs on a CPU: Inductor's own, and operations of torch between them.

    The call must have been compiled with `torch._inductor.config.cpp.enable_kernel_profile`.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    kernels: Counter[str] = Counter()
    for event in profile.events() or []:
        fused = "cpp_fused" in event.name or "cpp_CppMicro" in event.name
        plain = event.name.removeprefix("aten::")
        inner = any(child.name.startswith("aten::") for child in event.cpu_children)
        leaf = event.name.startswith("aten::") and not inner and plain not in VIEWS and not plain.startswith(FREE)
        if fused or leaf:
            kernels["fused" if fused else plain] += 1
    return kernels
