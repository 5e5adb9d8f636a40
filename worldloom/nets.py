"""Network layers, with parameters named as the papers' code names them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloom import functional as fn
from worldloom import products
from worldloom.gang import ALONE, Gang


def compile_part(owner: Any, name: str) -> None:
    """Compile the function that `owner` keeps under `name`, in place; compilation fails unless it is one graph."""
    setattr(owner, name, torch.compile(getattr(owner, name), fullgraph=True))


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return a context for matrix products in `dtype`.

    Each phase of an update has its own, since weights that were cast without gradient must not serve where a gradient
    is needed.
    """
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def float32_products(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products of float32 matrices stay in float32, whatever `autocast` around it says."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


class SimNorm(nn.Module):
    """Softmax over consecutive groups of the last axis (Hansen et al. 2024, eq. 5): [..., D] to [..., D].

    group: entries of a group; D is a multiple of it.
    """

    def __init__(self, group: int = 8) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return fn.short_softmax(x.unflatten(-1, (-1, self.group))).flatten(-2)


class _CpuMish(torch.autograd.Function):
    """Mish from vectorised operations, one piece that fits the cache at a time. torch's CPU kernel is scalar and takes
    4 times as long; intermediate arrays of full size would cost fresh memory.

    With s = sigmoid(x), u = s (2 - s) and r = 2 - u, tanh(softplus(x)) = u / r, free of overflow and cancellation, and
    the slope is (4 x s (1 - s)^2 / r + u) / r.
    """

    PIECE = 200_000  # numbers

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        out, slope = torch.empty_like(x), torch.empty_like(x) if ctx.needs_input_grad[0] else None
        one, two, size = x.new_tensor(1), x.new_tensor(2), min(_CpuMish.PIECE, x.numel())
        scratch = x.new_empty(3, max(size, 1))
        slopes = [None] * -(-x.numel() // max(size, 1)) if slope is None else slope.view(-1).split(size)
        for piece, result, steep in zip(x.view(-1).split(size), out.view(-1).split(size), slopes, strict=False):
            s, u, r = scratch[:, : len(piece)]
            torch.sigmoid(piece, out=s)
            torch.sub(two, s, out=u).mul_(s)
            torch.sub(two, u, out=r)
            torch.div(u, r, out=result).mul_(piece)
            if steep is not None:
                torch.sub(one, s, out=steep).square_().mul_(s).mul_(4).mul_(piece).div_(r).add_(u).div_(r)
        if slope is not None:
            ctx.save_for_backward(slope)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return cast(Tensor, gradients[0] * slope)


def mish(x: Tensor) -> Tensor:
    """Return x tanh(softplus(x)), elementwise: [...] to [...] (Misra 2019)."""
    if fn.eager_on_cpu(x):
        return cast(Tensor, _CpuMish.apply(x))  # type: ignore[no-untyped-call]
    return F.mish(x)


class NormedLinear(products.Linear):
    """Linear, then LayerNorm, then activation: [..., inputs] to [..., outputs]."""

    def __init__(self, inputs: int, outputs: int, activation: Callable[[Tensor], Tensor] = mish) -> None:
        super().__init__(inputs, outputs)
        self.ln = nn.LayerNorm(outputs)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.ln(super().forward(x)))


def mlp(
    sizes: Sequence[int], outputs: int, output_activation: Callable[[Tensor], Tensor] | None = None
) -> nn.Sequential:
    """Make NormedLinear layers through `sizes` (the input first), then a NormedLinear with `output_activation`,
    or a plain linear layer without one: [..., sizes[0]] to [..., outputs]."""
    layers: list[nn.Module] = [NormedLinear(i, o) for i, o in pairwise(sizes)]
    if output_activation is None:
        layers.append(products.Linear(sizes[-1], outputs))
    else:
        layers.append(NormedLinear(sizes[-1], outputs, output_activation))
    return nn.Sequential(*layers)


def relu_mlp(inputs: int, units: int, layers: int) -> nn.Sequential:
    """Make `layers` times linear (without bias), layer norm, ReLU: [..., inputs] to [..., units]."""
    made: list[nn.Module] = []
    for layer in range(layers):
        made += [products.Linear(inputs if layer == 0 else units, units, bias=False), nn.LayerNorm(units), nn.ReLU()]
    return nn.Sequential(*made)


def relu_head(inputs: int, units: int, layers: int, outputs: int) -> nn.Sequential:
    """Make a `relu_mlp` with a linear output: [..., inputs] to [..., outputs]."""
    return nn.Sequential(*relu_mlp(inputs, units, layers), products.Linear(units, outputs))


def mlp_of_pair(network: nn.Sequential, z: Tensor, action: Tensor) -> Tensor:
    """Apply `network`, made by `mlp`, to z [..., D] and action [..., A] concatenated; return [..., outputs].

    If one z serves many actions (z [E, 1, D], action [E, S, A]), the first layer's product with z is computed once.
    """
    if z.shape[:-1] == action.shape[:-1]:
        return cast(Tensor, network(torch.cat([z, action], -1)))
    first, width = cast(NormedLinear, network[0]), z.shape[-1]
    x = products.linear(action, first.weight[:, width:]) + products.linear(z, first.weight[:, :width], first.bias)
    return cast(Tensor, network[1:](first.activation(first.ln(x))))


EPS = 1e-5  # eps of norms


@dataclass(frozen=True)
class Statistics:
    """Holds what batch norms saw in a batch, which is that of all learners of a gang together."""

    gang: Gang = ALONE
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # mean and unbiased variance [C] of each norm


class BatchNorm(nn.Module):
    """Batch norm over all but the channels of [N, C, h, w], then ReLU.

    Learning passes `seen`, normalises with the batch's own statistics and leaves them there, so that a loss changes no
    buffer; `move` does. Without it the running statistics are used.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, seen: Statistics | None = None) -> Tensor:
        if seen is None:
            mean, var = self.running_mean, self.running_var
            return F.relu(F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=EPS))
        if seen.gang.size > 1:
            return F.relu(self._normed_together(x, seen))
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        out = F.batch_norm(x, mean, var, self.weight, self.bias, training=True, momentum=1.0, eps=EPS)
        seen.pairs.append((mean, var))  # with a momentum of 1 the batch's own, variance unbiased
        return F.relu(out)

    def _normed_together(self, x: Tensor, seen: Statistics) -> Tensor:
        """Return x normalised with the statistics of all learners' shares, which have one size.

        The mean square is taken in float64, so that the mean's own can be taken off it.
        """
        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        mean, square = seen.gang.average(torch.stack([mean.double(), mean.double().square() + var])).unbind()
        var, mean = (square - mean.square()).float(), mean.float()
        count = seen.gang.size * x.numel() // x.shape[1]
        seen.pairs.append((mean.detach(), var.detach() * (count / (count - 1))))
        shift, scale = (value[:, None, None] for value in (mean, self.weight * (var + EPS).rsqrt()))
        return ((x - shift) * scale + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def move(self, mean: Tensor, var: Tensor, rate: float, made: Tensor) -> None:
        """Move the running statistics towards a batch's: running += rate (batch - running).

        made: bool scalar; where it is False they stay, even if the batch's are not finite.
        """
        for running, found in ((self.running_mean, mean), (self.running_var, var)):
            running.lerp_(torch.where(made, found, running), rate)


class EnsembleLinear(nn.Module):
    """N linear layers with stacked parameters: weight [N, out, in], bias [N, out] and, if `normed`, those of `ln`."""

    def __init__(self, members: int, inputs: int, outputs: int, normed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(members, outputs))
        self.ln = nn.LayerNorm(outputs) if normed else None
        if self.ln is not None:
            self.ln.weight = nn.Parameter(torch.ones(members, outputs))
            self.ln.bias = nn.Parameter(torch.zeros(members, outputs))


class Ensemble(nn.Module):
    """N MLPs of one shape, evaluated together: two NormedLinear layers and a linear output each."""

    def __init__(self, members: int, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first = EnsembleLinear(members, inputs, hidden, normed=True)
        self.second = EnsembleLinear(members, hidden, hidden, normed=True)
        self.output = EnsembleLinear(members, hidden, outputs, normed=False)

    @property
    def members(self) -> int:
        """The number of members, N."""
        return self.first.weight.shape[0]

    def forward(
        self,
        x: Tensor,
        heads: Tensor | None = None,
        dropped: Tensor | None = None,
        rate: float = 0.0,
        frozen: bool = False,
    ) -> Tensor:
        """Map x [..., I] to [N, ..., O].

        heads: [N'] indices of the only members to evaluate. dropped: [..., N, hidden], True where dropout, with
        probability `rate`, zeroes an output of the first layer (before its norm). frozen: gradients flow to x but not
        into the parameters.
        """
        layers = [self._parameters_of(layer, frozen) for layer in (self.first, self.second, self.output)]
        lead, flat = x.shape[:-1], x.reshape(-1, x.shape[-1])
        if dropped is not None:
            dropped = dropped.reshape(len(flat), *dropped.shape[-2:])
        out = (_one_by_one if fn.eager_on_cpu(x) else _together)(flat, layers, heads, dropped, rate)
        return out.view(len(out), *lead, out.shape[-1])

    @staticmethod
    def _parameters_of(layer: EnsembleLinear, frozen: bool) -> list[Tensor]:
        found: list[Tensor] = [layer.weight, layer.bias]
        if layer.ln is not None:
            found += [layer.ln.weight, layer.ln.bias]
        return [p.detach() if frozen else p for p in found]


Layers = Sequence[Sequence[Tensor]]  # weight, bias and, where there is a norm, its weight and bias: [N, …] each


def _together(x: Tensor, layers: Layers, heads: Tensor | None, dropped: Tensor | None, rate: float) -> Tensor:
    """Evaluate all members at once, x [R, I] to [N, R, O], with few large products, which suit a GPU."""
    chosen = layers if heads is None else [[p[heads] for p in layer] for layer in layers]
    (w0, b0, g0, c0), (w1, b1, *norm1), (w2, b2) = chosen
    h, eps = F.linear(x, w0.flatten(0, 1), b0.flatten()).view(len(x), *b0.shape), EPS  # [R, N, M]
    if dropped is not None:
        h, eps = h.masked_fill(dropped, 0.0), _eps_after(rate)
    h = mish(torch.addcmul(c0, F.layer_norm(h, h.shape[-1:], eps=eps), g0))
    h = h.transpose(0, 1)  # [N, R, M], as the products of the next layers keep it
    h = torch.baddbmm(b1.unsqueeze(1), h, w1.mT)
    g1, c1 = (p.unsqueeze(1) for p in norm1)
    h = mish(torch.addcmul(c1, F.layer_norm(h, h.shape[-1:], eps=EPS), g1))
    return torch.baddbmm(b2.unsqueeze(1), h, w2.mT)


def _one_by_one(x: Tensor, layers: Layers, heads: Tensor | None, dropped: Tensor | None, rate: float) -> Tensor:
    """Evaluate one member at a time: on a CPU the arrays between the layers of one member stay in the cache."""
    members = [[p.unbind() for p in layer] for layer in layers]
    outputs = []
    for place, n in enumerate(range(len(members[0][0])) if heads is None else heads.tolist()):
        (w0, b0, g0, c0), (w1, b1, g1, c1), (w2, b2) = ([p[n] for p in layer] for layer in members)
        h, eps = products.linear(x, w0, b0), EPS
        if dropped is not None:
            h, eps = h.masked_fill_(dropped[:, place], 0.0), _eps_after(rate)
        h = mish(F.layer_norm(h, h.shape[-1:], g0, c0, eps))
        h = mish(F.layer_norm(products.linear(h, w1, b1), b1.shape, g1, c1, EPS))
        outputs.append(products.linear(h, w2, b2))
    return torch.stack(outputs)


def _eps_after(rate: float) -> float:
    """Return the eps with which a norm after dropout gives the same result without the division by 1 - rate."""
    return EPS * (1 - rate) ** 2


@torch.no_grad()
def flatten(parameters: Sequence[Tensor]) -> npt.NDArray[Any]:
    """Return all parameters, in order, as one flat array [P] on the CPU; `load_flat` reads it."""
    return torch.cat([p.flatten() for p in parameters]).cpu().numpy()


@torch.no_grad()
def load_flat(parameters: Sequence[Tensor], flat: npt.NDArray[Any]) -> None:
    """Fill parameters, in order, from one flat array [P]. Raises ValueError if their number differs."""
    expected = sum(p.numel() for p in parameters)
    if flat.shape != (expected,):
        raise ValueError(f"acting weights are {flat.shape}, expected ({expected},). They belong to another model.")
    pieces = torch.from_numpy(flat.copy()).split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.copy_(piece.view_as(parameter))
