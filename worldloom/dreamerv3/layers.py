"""DreamerV3's layers: linear, block-linear and convolution with its initialisation, RMSNorm, MLP."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-4


def init_kernel(weight: Tensor, fan_in: int, scale: float = 1.0) -> None:
    """Fill `weight` from a normal, cut at two sigma, whose true standard deviation is scale / sqrt(fan_in)."""
    sigma = 1.1368 / math.sqrt(fan_in)  # the cut removes 12 % of the spread
    nn.init.trunc_normal_(weight, 0.0, sigma, -2 * sigma, 2 * sigma)
    with torch.no_grad():
        weight.mul_(scale)


class Linear(nn.Linear):
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
        out = self.grouped(x, own)
        if shared is None:
            return out + self.bias.to(out.dtype)
        return out + torch.addmm(self.bias, shared, rest)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Return the weight as its products take it: by blocks [G, I / G, O / G], and the shared part [shared, O]."""
        own, rest = self.weight.split([self.own, len(self.weight) - self.own])  # one gradient for both, unlike slices
        return own.transpose(0, 1), rest.flatten(1)

    def grouped(self, x: Tensor, own: Tensor) -> Tensor:
        """Return [R, outputs]: each block of x [R, inputs] times its block of `own` [G, I / G, O / G]."""
        blocks = x.view(len(x), len(own), -1).transpose(0, 1)
        return torch.bmm(blocks, own).transpose(0, 1).reshape(len(x), -1)

    def product(self, inputs: Tensor, gradients: Tensor) -> Tensor:
        """Return the weight's gradient, from inputs [N, inputs + shared] and the gradients of outputs [N, outputs]."""
        blocks = self.weight.shape[1]
        own, shared = inputs.split([self.own * blocks, inputs.shape[1] - self.own * blocks], 1)
        by_block = [value.unflatten(1, (blocks, -1)).transpose(0, 1) for value in (own, gradients)]
        formed = torch.bmm(by_block[0].mT, by_block[1]).transpose(0, 1)  # [I / G, G, O / G]
        if not shared.shape[1]:
            return formed
        return torch.cat([formed, (shared.mT @ gradients).unflatten(1, (blocks, -1))])


class RMSNorm(nn.Module):
    """x scale / sqrt(mean(x^2) + 1e-4) over the last axis [..., size], in float32 or wider (Zhang & Sennrich 2019)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(wide, self.scale.shape, self.scale.to(wide.dtype), NORM_EPS).to(x.dtype)


def scaled_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Apply `RMSNorm` to x [..., O] with a scale [..., O] for every row, so that every row's scale has a gradient."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (F.rms_norm(wide, wide.shape[-1:], None, NORM_EPS) * scale).to(x.dtype)


class NormedLinear(nn.Module):
    """Linear, RMSNorm, SiLU: [..., inputs] to [..., outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.norm = Linear(inputs, outputs), RMSNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.linear(x)))


def mlp(inputs: int, units: int, layers: int) -> nn.Sequential:
    """Make `layers` layers of `units` with norm and SiLU: [..., inputs] to [..., units]."""
    return nn.Sequential(*[NormedLinear(inputs if i == 0 else units, units) for i in range(layers)])
