"""STORM's encoder and decoder of single observations: neither sees the history (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from worldloom import functional as fn
from worldloom.nets import BatchNorm, Statistics, relu_mlp
from worldloom.observations import (
    ObsShapes,
    flat_vectors,
    joined_images,
    reconstruction_errors,
    split_images,
    split_kinds,
    vector_sizes,
)
from worldloom.products import Linear

STAGES = 4  # of an image, each of which halves its sides


def stage_channels(first: int) -> list[int]:
    """Return the channels of the image stages: `first`, doubled at each stage."""
    return [first * 2**stage for stage in range(STAGES)]


class ImageEncoder(nn.Module):
    """Stages of 4x4 convolution with stride 2, batch norm and ReLU: [N, C, h, w] to [N, first / 2 h w / 16]."""

    def __init__(self, channels: int, first: int) -> None:
        super().__init__()
        widths = [channels, *stage_channels(first)]
        self.convs = nn.ModuleList([nn.Conv2d(i, o, 4, 2, 1, bias=False) for i, o in pairwise(widths)])
        self.norms = nn.ModuleList([BatchNorm(width) for width in widths[1:]])

    def forward(self, x: Tensor, seen: Statistics | None = None) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x), seen)
        return x.flatten(1)  # in the order channels, height, width


class Encoder(nn.Module):
    """Encoder of observations to embeddings [..., E]: vectors first (symlog, then MLP), then images.

    Vectors are an extension of ours. first: channels of the first image stage.
    """

    def __init__(self, shapes: ObsShapes, units: int, layers: int, first: int) -> None:
        super().__init__()
        self.vectors, self.images = split_kinds(shapes)
        self.vector = relu_mlp(sum(vector_sizes(self.vectors, {}).values()), units, layers) if self.vectors else None
        self.image = ImageEncoder(sum(shape[0] for shape in self.images.values()), first) if self.images else None
        self.size = units if self.vectors else 0
        if self.images:
            self.size += image_numbers(self.images, first)

    def forward(self, obs: Mapping[str, Tensor], seen: Statistics | None = None) -> Tensor:
        """Return embeddings [..., E]. obs: [..., *shape] by name; images are uint8, or floats in [0, 1]. seen: as
        `BatchNorm` takes it."""
        parts = []
        if self.vector is not None:
            parts.append(self.vector(flat_vectors(obs, self.vectors, {})))
        if self.image is not None:
            pixels = joined_images(obs, self.images)
            parts.append(self.image(pixels.flatten(0, -4), seen).view(*pixels.shape[:-3], -1))
        return torch.cat(parts, -1)


def image_numbers(images: ObsShapes, first: int) -> int:
    """Return the size of the encoder's last feature map: channels times height times width."""
    height, width = next(iter(images.values()))[1:]
    size: int = stage_channels(first)[-1] * (height // 2**STAGES) * (width // 2**STAGES)
    return size


class ImageDecoder(nn.Module):
    """The encoder's mirror: a linear layer to the smallest feature map, then transposed convolutions."""

    def __init__(self, latent: int, images: ObsShapes, first: int) -> None:
        super().__init__()
        height, width = next(iter(images.values()))[1:]
        widths = stage_channels(first)[::-1]
        self.grid = (widths[0], height // 2**STAGES, width // 2**STAGES)
        self.input = Linear(latent, image_numbers(images, first), bias=False)
        self.norms = nn.ModuleList([BatchNorm(width) for width in widths])
        self.convs = nn.ModuleList([nn.ConvTranspose2d(i, o, 4, 2, 1, bias=False) for i, o in pairwise(widths)])
        self.output = nn.ConvTranspose2d(widths[-1], sum(shape[0] for shape in images.values()), 4, 2, 1)

    def forward(self, z: Tensor, seen: Statistics | None = None) -> Tensor:
        """Return images [N, C, h, w], around [0, 1] and not cut to it, from latents [N, S K]."""
        x = self.norms[0](self.input(z).view(-1, *self.grid), seen)
        for conv, norm in zip(self.convs, list(self.norms)[1:], strict=True):
            x = norm(conv(x), seen)
        out: Tensor = self.output(x)
        return out


class Decoder(nn.Module):
    """Decoder of latents [..., S K] to every observation: vectors in symlog space, images around [0, 1]."""

    def __init__(self, shapes: ObsShapes, latent: int, units: int, layers: int, first: int) -> None:
        super().__init__()
        self.vectors, self.images = split_kinds(shapes)
        sizes = vector_sizes(self.vectors, {})
        self.vector = relu_mlp(latent, units, layers) if self.vectors else None
        self.outputs = nn.ModuleList([Linear(units, size) for size in sizes.values()])  # in order of name
        self.image = ImageDecoder(latent, self.images, first) if self.images else None

    def forward(self, z: Tensor, seen: Statistics | None = None) -> dict[str, Tensor]:
        """Decode z [..., S K] to [..., *shape] each. seen: as `BatchNorm` takes it."""
        lead = z.shape[:-1]
        decoded: dict[str, Tensor] = {}
        if self.vector is not None:
            x = self.vector(z)
            for (name, shape), output in zip(self.vectors.items(), self.outputs, strict=True):
                decoded[name] = output(x).view(*lead, *shape)
        if self.image is not None:
            pixels = self.image(z.reshape(-1, z.shape[-1]), seen)
            decoded |= split_images(pixels.view(*lead, *pixels.shape[1:]), self.images)
        return decoded

    def losses(self, decoded: Mapping[str, Tensor], obs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the error [...] of each observation; see `reconstruction_errors`."""
        return reconstruction_errors(decoded, obs, {**self.vectors, **self.images}, {})

    def shown(self, name: str, decoded: Tensor) -> Tensor:
        """Return a decoded observation in its own units: numbers, or images in [0, 1]."""
        return decoded.clamp(0, 1) if name in self.images else fn.symexp(decoded)
