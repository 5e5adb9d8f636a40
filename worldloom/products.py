"""Products of float32 matrices, on CPUs with vectors of 512 bits by oneDNN instead of MKL.

torch multiplies matrices on CPUs with MKL, which uses the widest vectors of Intel's processors only, and convolves
with oneDNN, which uses those of all. On an AMD EPYC (Zen 5) a product of 256 rows and more is 2.2 times as fast by
oneDNN, one of 16 rows 1.3 times. Both round in float32, and differ by the order of their sums. Intel's processors keep
MKL.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from worldloom import functional as fn


def _vendor() -> str:
    """Return what the system says of its processor; the vendor's name is among it on Linux and Windows."""
    told = Path("/proc/cpuinfo")
    return told.read_text() if told.is_file() else platform.processor()


# The call of torch's compiler for a linear layer with what follows it. Where a build has none, MKL does it all.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_WIDE = torch.backends.cpu.get_cpu_capability() == "AVX512" and "GenuineIntel" not in _vendor()
# A name of its own for compiled graphs: there the compiler expects weights that never change behind oneDNN's.
_LIBRARY = torch.library.Library("worldloom", "FRAGMENT")
WORTH = 1 << 21  # multiplications from which the call's own 10 microseconds are won back


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b, [..., O], from x [..., I], weight [O, I] and bias [O]."""
    if not _wins(x, weight, len(weight)):
        return F.linear(x, weight, bias)
    if _needs_gradient(x, weight, *([] if bias is None else [bias])):
        return cast(Tensor, _Linear.apply(x, weight, bias))  # type: ignore[no-untyped-call]
    return _product(x, weight.mT, bias)


def addmm(added: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return added + x W, [R, O], from added [R, O], x [R, I] and a weight [I, O] that needs no gradient."""
    assert not _needs_gradient(weight)
    if not _wins(x, weight, weight.shape[1]):
        return torch.addmm(added, x, weight)
    return cast(Tensor, _Added.apply(added, x, weight))  # type: ignore[no-untyped-call]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a b, [N, O], from a [N, I] and b [I, O]; the product itself has no gradient by oneDNN."""
    assert not _needs_gradient(a, b)
    return _product(a, b) if _wins(a, b, b.shape[1]) else a @ b


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """Return the products of G pairs of matrices, [G, N, O], from a [G, N, I] and b [G, I, O]."""
    if not one_by_one(a, b):
        return torch.bmm(a, b)
    return torch.stack([_product(one, other) for one, other in zip(a.unbind(), b.unbind(), strict=True)])


def one_by_one(a: Tensor, b: Tensor) -> bool:
    """Return whether the products of G pairs, a [G, N, I] and b [G, I, O], are faster as G products by oneDNN."""
    return not _needs_gradient(a, b) and _wins(a[0], b, b.shape[2])


class Linear(nn.Linear):
    """A linear layer, [..., inputs] to [..., outputs], whose products are those of this file."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def _needs_gradient(*values: Tensor) -> bool:
    return torch.is_grad_enabled() and any(value.requires_grad for value in values)


def _wins(x: Tensor, weight: Tensor, outputs: int) -> bool:
    return (
        _ONEDNN is not None
        and _WIDE
        and x.is_cpu
        and x.numel() * outputs >= WORTH
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not fn.exporting()
    )


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    if torch.compiler.is_compiling():
        return cast(Tensor, torch.ops.worldloom.product(a, b, bias))
    return _by_onednn(a, b, bias)


def _by_onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    assert _ONEDNN is not None
    return cast(Tensor, _ONEDNN(_dense(a), _dense(b).mT, bias, "none", [], ""))


def _shape_of_product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return a.new_empty(*a.shape[:-1], b.shape[1])


def _dense(x: Tensor) -> Tensor:
    """Return x without gaps between its rows or columns, with which oneDNN would compute without vectors."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


_LIBRARY.define("product(Tensor a, Tensor b, Tensor? bias) -> Tensor")
_LIBRARY.impl("product", _by_onednn, "CPU")
torch.library.register_fake("worldloom::product", _shape_of_product, lib=_LIBRARY)


class _Linear(torch.autograd.Function):
    """`linear`; its gradients are such products too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight.mT, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, needed = gradient.flatten(0, -2), ctx.needs_input_grad
        of_x = _product(gradient, weight) if needed[0] else None
        of_weight = _product(rows.mT, x.flatten(0, -2)) if needed[1] else None
        return of_x, of_weight, rows.sum(0) if needed[2] else None


class _Added(torch.autograd.Function):
    """`addmm`, with gradients of what is added and of x."""

    @staticmethod
    def forward(ctx: Any, added: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return added + _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (weight,) = ctx.saved_tensors
        of_x = _product(gradient, weight.mT) if ctx.needs_input_grad[1] else None
        return gradient if ctx.needs_input_grad[0] else None, of_x, None
