"""Network layers, with parameters named as the papers' code names them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloom import functional as fn


class SimNorm(nn.Module):
    """Softmax over consecutive groups of the last axis (TD-MPC2, eq. 5): [..., D] to [..., D]."""

    def __init__(self, group: int = 8) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return fn.short_softmax(x.unflatten(-1, (-1, self.group))).flatten(-2)


class _CpuMish(torch.autograd.Function):
    """Mish out of vectorised parts: torch's CPU kernel is scalar and takes 4 times as long.

    With s = sigmoid(x) and u = s (2 - s), tanh(softplus(x)) = u / (2 - u), free of overflow and cancellation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        s = torch.sigmoid(x)
        u = (2 - s).mul_(s)
        return u.div_(s.fill_(2).sub_(u)).mul_(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        u = (2 - s).mul_(s)
        rest = 2 - u
        slope = (1 - s).square_().mul_(s).mul_(4).mul_(x).div_(rest).add_(u).div_(rest)
        return slope.mul_(gradients[0])


def mish(x: Tensor) -> Tensor:
    """x tanh(softplus(x)), elementwise (Misra 2019)."""
    if not x.is_cpu or torch.compiler.is_compiling():
        return F.mish(x)
    return cast(Tensor, _CpuMish.apply(x))  # type: ignore[no-untyped-call]


class NormedLinear(nn.Linear):
    """Linear, then LayerNorm, then activation."""

    def __init__(self, inputs: int, outputs: int, activation: Callable[[Tensor], Tensor] = mish) -> None:
        super().__init__(inputs, outputs)
        self.ln = nn.LayerNorm(outputs)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.ln(super().forward(x)))


def mlp(
    sizes: Sequence[int], outputs: int, output_activation: Callable[[Tensor], Tensor] | None = None
) -> nn.Sequential:
    """NormedLinear layers through `sizes` (the input first), then a NormedLinear with `output_activation`,
    or a plain linear layer where there is none."""
    layers: list[nn.Module] = [NormedLinear(i, o) for i, o in pairwise(sizes)]
    if output_activation is None:
        layers.append(nn.Linear(sizes[-1], outputs))
    else:
        layers.append(NormedLinear(sizes[-1], outputs, output_activation))
    return nn.Sequential(*layers)


def mlp_of_pair(network: nn.Sequential, z: Tensor, action: Tensor) -> Tensor:
    """`network`, made by `mlp`, on the concatenation of z [..., D] and action [..., A].

    Where one z serves many actions (z [E, 1, D], action [E, S, A]), the first layer's product with z is computed once.
    """
    if z.shape[:-1] == action.shape[:-1]:
        return cast(Tensor, network(torch.cat([z, action], -1)))
    first, width = cast(NormedLinear, network[0]), z.shape[-1]
    x = F.linear(action, first.weight[:, width:]) + F.linear(z, first.weight[:, :width], first.bias)
    return cast(Tensor, network[1:](first.activation(first.ln(x))))


class EnsembleLinear(nn.Module):
    """N linear layers with stacked parameters: weight [N, out, in], bias [N, out]; `ln` as well if `normed`."""

    def __init__(self, members: int, inputs: int, outputs: int, normed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(members, outputs))
        self.ln = nn.LayerNorm(outputs) if normed else None
        if self.ln is not None:
            self.ln.weight = nn.Parameter(torch.ones(members, outputs))
            self.ln.bias = nn.Parameter(torch.zeros(members, outputs))


class Ensemble(nn.Module):
    """N MLPs of one shape with two NormedLinear layers and a linear output, evaluated together.

    The first layer of all members is one matrix product, since they read the same input.
    """

    def __init__(self, members: int, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first = EnsembleLinear(members, inputs, hidden, normed=True)
        self.second = EnsembleLinear(members, hidden, hidden, normed=True)
        self.output = EnsembleLinear(members, hidden, outputs, normed=False)

    @property
    def members(self) -> int:
        return self.first.weight.shape[0]

    def forward(
        self, x: Tensor, heads: Tensor | None = None, dropout: Tensor | None = None, frozen: bool = False
    ) -> Tensor:
        """x: [..., I] to [N, ..., O].

        heads: [N'] indices, evaluates only those members. dropout: [..., N, hidden] factors for the first
        layer (before its norm). frozen: gradients flow to x but not into the parameters.
        """
        parameters = [self._parameters_of(layer, heads, frozen) for layer in (self.first, self.second, self.output)]
        (w0, b0, *norm0), (w1, b1, *norm1), (w2, b2) = parameters
        lead, flat = x.shape[:-1], x.reshape(-1, x.shape[-1])
        h = F.linear(flat, w0.flatten(0, 1), b0.flatten()).view(len(flat), *b0.shape)  # [R, N, M]
        if dropout is not None:
            h = h * dropout.reshape(h.shape)
        h = _norm_mish(h, *norm0).transpose(0, 1)  # [N, R, M], as the products of the next layers keep it
        h = _norm_mish(torch.baddbmm(b1.unsqueeze(1), h, w1.mT), *(p.unsqueeze(1) for p in norm1))
        out = torch.baddbmm(b2.unsqueeze(1), h, w2.mT)
        return out.view(len(out), *lead, out.shape[-1])

    @staticmethod
    def _parameters_of(layer: EnsembleLinear, heads: Tensor | None, frozen: bool) -> list[Tensor]:
        found: list[Tensor] = [layer.weight, layer.bias]
        if layer.ln is not None:
            found += [layer.ln.weight, layer.ln.bias]
        chosen = [p.detach() if frozen else p for p in found]
        return chosen if heads is None else [p[heads] for p in chosen]


def _norm_mish(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm over the last axis with an affine of any shape that broadcasts, then Mish."""
    return mish(torch.addcmul(bias, F.layer_norm(x, x.shape[-1:]), weight))


@torch.no_grad()
def flatten(parameters: Sequence[Tensor]) -> npt.NDArray[Any]:
    """All parameters, in order, as one flat array on the CPU; `load_flat` takes it apart."""
    return torch.cat([p.flatten() for p in parameters]).cpu().numpy()


@torch.no_grad()
def load_flat(parameters: Sequence[Tensor], flat: npt.NDArray[Any]) -> None:
    """Fill parameters, in order, from one flat array. Raises ValueError if their number differs."""
    expected = sum(p.numel() for p in parameters)
    if flat.shape != (expected,):
        raise ValueError(f"{flat.shape} acting weights, expected ({expected},): another model's weights.")
    pieces = torch.from_numpy(flat.copy()).split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.copy_(piece.view_as(parameter))
