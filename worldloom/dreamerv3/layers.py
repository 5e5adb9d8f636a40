"""DreamerV3's layers: linear, block-linear and convolution with its initialisation, RMSNorm with SiLU, MLP."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from worldloom import functional as fn
from worldloom import products

NORM_EPS = 1e-4


def init_kernel(weight: Tensor, fan_in: int, scale: float = 1.0) -> None:
    """Fill `weight` from a normal, cut at two sigma, whose true standard deviation is scale / sqrt(fan_in)."""
    sigma = 1.1368 / math.sqrt(fan_in)  # the cut removes 12 % of the spread
    nn.init.trunc_normal_(weight, 0.0, sigma, -2 * sigma, 2 * sigma)
    with torch.no_grad():
        weight.mul_(scale)


class Linear(products.Linear):
    """A linear layer, [..., inputs] to [..., outputs]; scale multiplies its initial kernel."""

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__(inputs, outputs)
        init_kernel(self.weight, inputs, scale)
        nn.init.zeros_(self.bias)


class Conv(nn.Conv2d):
    """A 5x5 convolution with same padding: [N, inputs, h, w] to [N, outputs, h, w]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 5, padding=2)
        init_kernel(self.weight, 25 * inputs)
        assert self.bias is not None
        nn.init.zeros_(self.bias)


class UpConv(Conv):
    """Doubles height and width (nearest neighbour), then a 5x5 convolution with same padding: [N, inputs, h, w] to
    [N, outputs, 2 h, 2 w].

    Each 2x2 block of outputs sees only 3x3 inputs. So a 3x3 convolution with 4 times the outputs gives the same with
    2.8 times fewer products; its kernels are sums of the 5x5 kernel's entries.
    """

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        kernels = _summed_pairs(_summed_pairs(self.weight).mT).mT  # [p, q, O, C, 3, 3], p, q: parity of row and column
        kernels = kernels.permute(2, 0, 1, 3, 4, 5).flatten(0, 2)
        parts = F.conv2d(x, kernels.to(x.dtype), self.bias.repeat_interleave(4).to(x.dtype), padding=1)
        return F.pixel_shuffle(parts, 2)


def _summed_pairs(kernel: Tensor) -> Tensor:
    """Sum neighbours in the last axis, which see the same input of `UpConv`: [..., 5] to [2, ..., 3] for even and odd
    outputs. Sums and not products, which autocast would round to bfloat16 before they are added."""
    both = torch.stack([F.pad(kernel, (0, 1)), F.pad(kernel, (1, 0))])
    summed: Tensor = both.unflatten(-1, (3, 2)).sum(-1)
    return summed


class BlockLinear(nn.Module):
    """A linear layer whose `blocks` groups of outputs see their own group of inputs and all `shared` further inputs.

    weight: [inputs / blocks + shared, blocks, outputs / blocks], so that the shared part is one matrix in memory.
    The fan-in of its initialisation is the full width of all groups, where the shared part counts once per group.
    """

    def __init__(self, inputs: int, outputs: int, blocks: int, shared: int = 0) -> None:
        super().__init__()
        self.own = inputs // blocks
        self.weight = nn.Parameter(torch.empty(self.own + shared, blocks, outputs // blocks))
        self.bias = nn.Parameter(torch.zeros(outputs))
        init_kernel(self.weight, inputs + blocks * shared)

    def forward(self, x: Tensor, shared: Tensor | None = None) -> Tensor:
        """Map x [R, inputs] and shared [R, shared] to [R, outputs]."""
        own, rest = self.parts()
        added = (
            self.bias.to(x.dtype).expand(len(x), -1) if shared is None else products.linear(shared, rest.mT, self.bias)
        )
        return self.grouped(x, own, added)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Return the weight as its products take it: by blocks [G, I / G, O / G], and the shared part [shared, O]."""
        own, rest = self.weight.split([self.own, len(self.weight) - self.own])  # one gradient for both, unlike slices
        return own.transpose(0, 1), rest.flatten(1)

    def grouped(self, x: Tensor, own: Tensor, added: Tensor) -> Tensor:
        """Return `added` [R, outputs] plus each block of x [R, inputs] times its block of `own` [G, I / G, O / G]."""
        blocks = x.view(len(x), len(own), -1).transpose(0, 1)
        if products.one_by_one(blocks, own):
            shares = added.unflatten(1, (len(own), -1)).unbind(1)
            return torch.cat(
                [part + products.matmul(*pair) for part, *pair in zip(shares, blocks, own, strict=True)], 1
            )
        product = torch.bmm(blocks, own).transpose(0, 1)  # the sum is laid out as `added`, which saves a copy
        return (added.view(product.shape) + product).flatten(1)

    def product(self, inputs: Tensor, gradients: Tensor) -> Tensor:
        """Return the weight's gradient, from inputs [N, inputs + shared] and the gradients of outputs [N, outputs]."""
        blocks = self.weight.shape[1]
        own, shared = inputs.split([self.own * blocks, inputs.shape[1] - self.own * blocks], 1)
        by_block = [value.unflatten(1, (blocks, -1)).transpose(0, 1) for value in (own, gradients)]
        formed = products.bmm(by_block[0].mT, by_block[1]).transpose(0, 1)  # [I / G, G, O / G]
        if not shared.shape[1]:
            return formed
        return torch.cat([formed, products.matmul(shared.mT, gradients).unflatten(1, (blocks, -1))])


class _CpuNormSiLU(torch.autograd.Function):
    """`norm_silu` in 5 operations, and 7 for its gradients: torch has no RMSNorm of its own for CPUs, and composes one
    from 7 and 18, which takes 1.3 (few rows) to 1.8 times as long.

    With r = sqrt(x x + O eps), n = x / r and g the gradient of n, that of x is (g - n (g n)) / r. RMSNorm is sqrt(O) n,
    a factor that rides on operations which are needed anyway.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        root, zero = math.sqrt(x.shape[-1]), x.new_tensor(0.0)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(x.new_tensor(root * math.sqrt(NORM_EPS)))
        normed = x / length
        scaled = torch.addcmul(zero, normed, scale, value=root)
        ctx.save_for_backward(normed, length, scaled, scale)
        return F.silu(scaled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        normed, length, scaled, scale = ctx.saved_tensors
        root, zero = math.sqrt(scaled.shape[-1]), scaled.new_tensor(0.0)
        of_scaled = torch.ops.aten.silu_backward(gradient, scaled)
        of_scale = torch.addcmul(zero, of_scaled, normed, value=root)
        if scale.dim() == 1 or not scale.stride(0):  # the same for all rows
            along = (of_scale @ (scale if scale.dim() == 1 else scale[0])).unsqueeze(-1)
        else:
            along = (of_scale * scale).sum(-1, keepdim=True)
        of_normed = torch.addcmul(of_scaled.mul_(scale), normed, along, value=-1 / root)
        of_x = torch.addcdiv(zero, of_normed, length, value=root)
        return of_x, of_scale.sum_to_size(scale.shape) if ctx.needs_input_grad[1] else None


def norm_silu(x: Tensor, scale: Tensor) -> Tensor:
    """Apply RMSNorm, then SiLU, to x [..., O].

    scale: [O], or [..., O] for every row, so that every row's scale has a gradient.
    """
    if fn.eager_on_cpu(x) and x.dtype == scale.dtype:
        return cast(Tensor, _CpuNormSiLU.apply(x, scale))  # type: ignore[no-untyped-call]
    wide = x if x.dtype == torch.float64 else x.float()
    if scale.dim() == 1:
        normed = F.rms_norm(wide, scale.shape, scale.to(wide.dtype), NORM_EPS)
    else:
        normed = F.rms_norm(wide, wide.shape[-1:], None, NORM_EPS) * scale
    return F.silu(normed.to(x.dtype))


class NormSiLU(nn.Module):
    """n = x scale / sqrt(mean(x^2) + 1e-4) over the last axis [..., size], in float32 or wider (Zhang & Sennrich 2019),
    then SiLU, n sigmoid(n), which follows it everywhere."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return norm_silu(x, self.scale)


class NormedLinear(nn.Module):
    """Linear, RMSNorm, SiLU: [..., inputs] to [..., outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.norm = Linear(inputs, outputs), NormSiLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear(x))
        return out


def mlp(inputs: int, units: int, layers: int) -> nn.Sequential:
    """Make `layers` layers of `units` with norm and SiLU: [..., inputs] to [..., units]."""
    return nn.Sequential(*[NormedLinear(inputs if i == 0 else units, units) for i in range(layers)])
