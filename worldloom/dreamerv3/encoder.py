"""DreamerV3's encoder of observations to tokens, and its decoder of features to observations."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloom import functional as fn
from worldloom.dreamerv3.layers import BlockLinear, Conv, Linear, NormedLinear, NormSiLU, UpConv, mlp
from worldloom.observations import (
    Classes,
    ObsShapes,
    flat_vectors,
    joined_images,
    reconstruction_errors,
    split_images,
    split_kinds,
    vector_sizes,
)

MULTIPLIERS = (2, 3, 4, 4)  # of depth, channels of the four image stages


class ImageEncoder(nn.Module):
    """Stages of 5x5 convolution, 2x2 max-pool, RMSNorm over channels and SiLU: [N, C, h, w] to [N, tokens]."""

    def __init__(self, channels: int, depth: int, multipliers: tuple[int, ...] = MULTIPLIERS) -> None:
        super().__init__()
        widths = [channels, *(depth * m for m in multipliers)]
        self.convs = nn.ModuleList([Conv(i, o) for i, o in pairwise(widths)])
        self.norms = nn.ModuleList([NormSiLU(width) for width in widths[1:]])

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # faster, and norms read channels that lie together
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = _over_channels(norm, F.max_pool2d(conv(x), 2))
        return x.permute(0, 2, 3, 1).flatten(1)  # in the order height, width, channels, as in the reference


def _over_channels(norm: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = norm(x.permute(0, 2, 3, 1))
    return out.permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """Encoder of observations to tokens [..., E]: vectors first (symlog or one-hot, then MLP), then images."""

    def __init__(self, shapes: ObsShapes, classes: Classes, units: int, depth: int, layers: int) -> None:
        super().__init__()
        self.vectors, self.images = split_kinds(shapes)
        self.classes = classes
        self.vector = mlp(sum(vector_sizes(self.vectors, classes).values()), units, layers) if self.vectors else None
        channels = sum(shape[0] for shape in self.images.values())
        self.image = ImageEncoder(channels, depth) if self.images else None
        self.tokens = units if self.vectors else 0
        if self.images:
            height, width = next(iter(self.images.values()))[1:]
            self.tokens += (height // 16) * (width // 16) * depth * MULTIPLIERS[-1]

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Return tokens [..., E]. obs: [..., *shape] by name; images are uint8, or floats in [0, 1]."""
        parts = []
        if self.vector is not None:
            parts.append(self.vector(flat_vectors(obs, self.vectors, self.classes)))
        if self.image is not None:
            pixels = joined_images(obs, self.images) - 0.5
            lead = pixels.shape[:-3]
            parts.append(self.image(pixels.reshape(-1, *pixels.shape[-3:])).view(*lead, -1))
        return torch.cat(parts, -1)


class ImageDecoder(nn.Module):
    """Decoder of features to images [N, C, h, w] in (0, 1): a block-linear of deter plus an MLP of stoch, upsampled."""

    def __init__(
        self,
        deter: int,
        stoch: int,
        image: tuple[int, int, int],
        depth: int,
        units: int,
        blocks: int,
        multipliers: tuple[int, ...] = MULTIPLIERS,
    ) -> None:
        super().__init__()
        channels, height, width = image
        halvings = 2 ** len(multipliers)
        self.grid, self.blocks = (height // halvings, width // halvings), blocks
        widths = [depth * m for m in reversed(multipliers)]
        size = self.grid[0] * self.grid[1] * widths[0]
        self.deter_in = BlockLinear(deter, size, blocks)
        self.stoch_in = NormedLinear(stoch, 2 * units)
        self.stoch_grid = Linear(2 * units, size)
        self.grid_norm = NormSiLU(widths[0])
        self.convs = nn.ModuleList([UpConv(i, o) for i, o in pairwise(widths)])
        self.norms = nn.ModuleList([NormSiLU(width) for width in widths[1:]])
        self.output = UpConv(widths[-1], channels)

    def forward(self, deter: Tensor, stoch: Tensor) -> Tensor:
        """Return images [N, C, h, w] in (0, 1). deter: [N, D], stoch: [N, S K], flat."""
        height, width = self.grid
        own = self.deter_in(deter).view(-1, self.blocks, height, width, self.grid_norm.scale.numel() // self.blocks)
        own = own.permute(0, 2, 3, 1, 4).flatten(3)  # [N, h, w, channels]; each group fills consecutive channels
        x = own + self.stoch_grid(self.stoch_in(stoch)).view(own.shape)
        x = self.grid_norm(x).permute(0, 3, 1, 2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = _over_channels(norm, conv(x))
        return torch.sigmoid(self.output(x))


class Decoder(nn.Module):
    """Decoder of features to every observation: vectors in symlog space, logits of classes, images in (0, 1)."""

    def __init__(
        self,
        shapes: ObsShapes,
        classes: Classes,
        deter: int,
        stoch: int,
        units: int,
        depth: int,
        layers: int,
        blocks: int,
    ) -> None:
        super().__init__()
        self.vectors, self.images = split_kinds(shapes)
        self.classes, self.deter = classes, deter
        self.vector = mlp(deter + stoch, units, layers) if self.vectors else None
        sizes = vector_sizes(self.vectors, classes)
        self.outputs = nn.ModuleList([Linear(units, size) for size in sizes.values()])  # in order of name
        channels = sum(shape[0] for shape in self.images.values())
        self.image: ImageDecoder | None = None
        if self.images:
            height, width = next(iter(self.images.values()))[1:]
            self.image = ImageDecoder(deter, stoch, (channels, height, width), depth, units, blocks)

    def forward(self, deter: Tensor, stoch: Tensor) -> dict[str, Tensor]:
        """Decode deter [..., D] and flat stoch [..., S K] to [..., *shape] each, or logits [..., *shape, K]."""
        lead = deter.shape[:-1]
        decoded = {}
        if self.vector is not None:
            x = self.vector(torch.cat([stoch, deter], -1))  # stoch first, here only
            for (name, shape), output in zip(self.vectors.items(), self.outputs, strict=True):
                logits = (self.classes[name],) if name in self.classes else ()
                decoded[name] = output(x).view(*lead, *shape, *logits)
        if self.image is not None:
            pixels = self.image(deter.reshape(-1, deter.shape[-1]), stoch.reshape(-1, stoch.shape[-1]))
            decoded |= split_images(pixels.view(*lead, *pixels.shape[1:]), self.images)
        return decoded

    def losses(self, decoded: Mapping[str, Tensor], obs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the error [...] of each observation; see `reconstruction_errors`."""
        return reconstruction_errors(decoded, obs, {**self.vectors, **self.images}, self.classes)

    def shown(self, name: str, decoded: Tensor) -> Tensor:
        """Return a decoded observation in its own units: numbers, class indices, or images in [0, 1]."""
        if name in self.classes:
            return decoded.argmax(-1)
        return decoded if name in self.images else fn.symexp(decoded)
