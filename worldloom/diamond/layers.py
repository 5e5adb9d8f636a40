"""DIAMOND's layers: residual blocks that a vector conditions, attention, the U-Net, and recurrent cells.

Alonso et al. 2024, appendix on architectures; the U-Net follows Ronneberger et al. 2015.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 8  # channels of an attention head
Level = tuple[int, int, bool]  # channels, residual blocks, whether these have attention


def groups(channels: int) -> int:
    """Return how many groups a norm divides `channels` into: 32 to a group, where there are that many."""
    return max(1, channels // 32)


def conv3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """Return the layer with weights of 0; its bias stays."""
    nn.init.zeros_(layer.weight)
    return layer


class AdaGroupNorm(nn.Module):
    """A group norm whose scale and shift come from a vector: x (1 + scale) + shift, scale first."""

    def __init__(self, channels: int, cond: int) -> None:
        super().__init__()
        self.groups = groups(channels)
        self.linear = nn.Linear(cond, 2 * channels)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Map x [B, C, h, w] and cond [B, cond] to [B, C, h, w]."""
        scale, shift = self.linear(cond).chunk(2, 1)
        rows = x.reshape(1, -1, *x.shape[2:])  # one row of B C channels, so that one kernel norms, scales and shifts
        return F.group_norm(rows, len(x) * self.groups, (1 + scale).flatten(), shift.flatten()).view(x.shape)


class Attention(nn.Module):
    """Self-attention over the places of an image. Its result adds to the normalised input, not to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // HEAD)
        self.norm = nn.GroupNorm(groups(channels), channels)
        self.qkv_proj = nn.Conv2d(channels, 3 * channels, 1)
        self.out_proj = zeroed(nn.Conv2d(channels, channels, 1))
        nn.init.zeros_(cast(Tensor, self.out_proj.bias))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, h, w] to [B, C, h, w]."""
        x = self.norm(x)
        rows = self.qkv_proj(x).flatten(2).unflatten(1, (3, self.heads, -1))  # [B, 3, heads, c, h w]
        query, key, value = rows.unbind(1)
        # Few places, and few channels to a head: plain products take half of the time of torch's fused attention
        found = value @ torch.softmax((query * query.shape[2] ** -0.5).mT @ key, -1).mT  # [B, heads, c, h w]
        return x + cast(Tensor, self.out_proj(found.flatten(1, 2).unflatten(2, x.shape[2:])))


class ResBlock(nn.Module):
    """Two convolutions after conditioned norms, added to the input; then attention, if asked for."""

    def __init__(self, inputs: int, outputs: int, cond: int, attention: bool = False) -> None:
        super().__init__()
        self.proj = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        self.norm1 = AdaGroupNorm(inputs, cond)
        self.conv1 = conv3(inputs, outputs)
        self.norm2 = AdaGroupNorm(outputs, cond)
        self.conv2 = zeroed(conv3(outputs, outputs))
        self.attn = Attention(outputs) if attention else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Map x [B, inputs, h, w] and cond [B, cond] to [B, outputs, h, w]."""
        y = self.conv1(F.silu(self.norm1(x, cond)))
        y = self.conv2(F.silu(self.norm2(y, cond)))
        return cast(Tensor, self.attn(y + self.proj(x)))


class ResBlocks(nn.ModuleList):
    """Residual blocks in a row; sizes: (inputs, outputs) of each."""

    def __init__(self, sizes: Sequence[tuple[int, int]], cond: int, attention: bool = False) -> None:
        super().__init__(ResBlock(inputs, outputs, cond, attention) for inputs, outputs in sizes)

    def forward(self, x: Tensor, cond: Tensor) -> list[Tensor]:
        """Return the output of every block, for x [B, C, h, w] and cond [B, cond]."""
        outputs = []
        for block in self:
            x = block(x, cond)
            outputs.append(x)
        return outputs


class Halving(nn.Module):
    """The way down: levels of residual blocks, with half the sides from each to the next.

    levels: (channels, blocks, whether they have attention) of each, the widest first.
    """

    def __init__(self, levels: Sequence[Level], cond: int) -> None:
        super().__init__()
        before = [levels[0][0], *(c for c, _, _ in levels[:-1])]
        self.blocks = nn.ModuleList(
            ResBlocks([(b, c), *[(c, c)] * (depth - 1)], cond, attention)
            for b, (c, depth, attention) in zip(before, levels, strict=True)
        )
        self.downsamples = nn.ModuleList(nn.Conv2d(c, c, 3, stride=2, padding=1) for c, _, _ in levels[:-1])
        for layer in self.downsamples:
            nn.init.orthogonal_(cast(Tensor, layer.weight))

    def forward(self, x: Tensor, cond: Tensor) -> list[list[Tensor]]:
        """Return, for each level, its input and the output of every block; x: [B, C, h, w] as the first level has."""
        kept: list[list[Tensor]] = []
        for level, blocks in enumerate(self.blocks):
            x = self.downsamples[level - 1](kept[-1][-1]) if kept else x
            kept.append([x, *blocks(x, cond)])
        return kept


class UNet(nn.Module):
    """A U-Net of conditioned residual blocks; every block of the way up also reads one output of the way down.

    levels: as `Halving` takes them. Two blocks in the middle always have attention.
    """

    def __init__(self, levels: Sequence[Level], cond: int) -> None:
        super().__init__()
        channels = [c for c, _, _ in levels]
        self.down = Halving(levels, cond)
        self.middle = ResBlocks([(channels[-1], channels[-1])] * 2, cond, attention=True)
        self.up = nn.ModuleList(  # from the lowest level on
            ResBlocks([*[(2 * c, c)] * depth, (b + c, b)], cond, attention)
            for b, (c, depth, attention) in reversed(list(zip([channels[0], *channels[:-1]], levels, strict=True)))
        )
        self.upsamples = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2.0), conv3(c, c)) for c in reversed(channels[:-1])
        )

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Map x [B, C, h, w] and cond [B, cond] to [B, C, h, w], with the channels of the first level and any sides.

        Sides are padded with zeros, right and below, to a multiple of 2^(levels - 1), and the result is cut.
        """
        (height, width), step = x.shape[2:], 2 ** (len(self.up) - 1)
        if height % step or width % step:
            x = F.pad(x, (0, -width % step, 0, -height % step))
        kept = self.down(x, cond)
        x = self.middle(kept[-1][-1], cond)[-1]
        for level, blocks in enumerate(self.up):
            x = self.upsamples[level - 1](x) if level else x
            for block, skip in zip(cast(ResBlocks, blocks), reversed(kept[-1 - level]), strict=True):
                x = block(torch.cat([x, skip], 1), cond)
        return x[..., :height, :width]


class LSTMCell(nn.LSTMCell):
    """An LSTM cell whose gates start open to the past: input weights Xavier uniform, recurrent ones orthogonal."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight_ih)
        nn.init.orthogonal_(self.weight_hh)
        for bias in (self.bias_ih, self.bias_hh):
            nn.init.zeros_(bias)
        nn.init.ones_(self.bias_ih[self.hidden_size : 2 * self.hidden_size])  # of the forget gate

    def initial(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return the hidden and the cell state before any input, zeros [B, D] each."""
        zeros = self.weight_hh.new_zeros(batch, self.hidden_size)
        return zeros, zeros


class SmallResBlock(nn.Module):
    """One convolution after a norm, added to the input: [B, inputs, h, w] to [B, outputs, h, w]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups(inputs), inputs)
        self.conv = conv3(inputs, outputs)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.skip(x) + self.conv(F.silu(self.norm(x))))
