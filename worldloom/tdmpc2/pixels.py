"""TD-MPC2's image encoder: random shifts, four convolutions, SimNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from worldloom import functional as fn
from worldloom.nets import SimNorm
from worldloom.products import Linear

PAD = 3  # pixels that an image may shift by


class PixelEncoder(nn.Module):
    """An encoder of images [..., C, h, w] to simplices [..., D].

    64x64 images flatten to 512 numbers, which is D in the published sizes that take images. For another number a linear
    layer of ours projects them to D: such a model is not the reference's. Raises ValueError for images that are too
    small.
    """

    def __init__(self, shape: tuple[int, ...], latent_dim: int, simnorm_dim: int, channels: int = 32) -> None:
        super().__init__()
        sides = (7, 5, 3, 3)
        widths = [shape[0], *[channels] * len(sides)]
        strides = (2, 2, 2, 1)
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(widths[i], channels, side, stride)
                for i, (side, stride) in enumerate(zip(sides, strides, strict=True))
            ]
        )
        height, width = shape[1:]
        for side, stride in zip(sides, strides, strict=True):
            height, width = (height - side) // stride + 1, (width - side) // stride + 1
        if min(height, width) < 1:
            raise ValueError(f"obs_shape is {shape}, expected images of at least 39x39. Resize them.")
        flat = channels * height * width
        self.projection = None if flat == latent_dim else Linear(flat, latent_dim)
        self.norm = SimNorm(simnorm_dim)

    def forward(self, image: Tensor, shift: Tensor | None = None) -> Tensor:
        """Return simplices [..., D] of images, uint8 or floats in [0, 1]; shift: [..., 2], see `draw_shifts`."""
        lead = image.shape[:-3]
        x = fn.unit_pixels(image.reshape(-1, *image.shape[-3:]))
        if shift is not None:
            x = shifted(x, shift.reshape(-1, 2))
        x = x - 0.5
        for conv in self.convs[:-1]:
            x = F.relu(conv(x))
        x = self.convs[-1](x).flatten(1)
        if self.projection is not None:
            x = self.projection(x)
        simplices: Tensor = self.norm(x)
        return simplices.view(*lead, -1)


def draw_shifts(lead: tuple[int, ...], device: torch.device, generator: Generator | None = None) -> Tensor:
    """Draw shifts [*lead, 2], right and down, uniform in 0..6 pixels; 3 leaves an image where it is."""
    return torch.randint(2 * PAD + 1, (*lead, 2), device=device, generator=generator)


def as_shifts(uniform: Tensor) -> Tensor:
    """Return the shifts of `draw_shifts`, [..., 2], from uniform random numbers [..., 2] in [0, 1)."""
    return (uniform * (2 * PAD + 1)).long().clamp(max=2 * PAD)


def shifted(images: Tensor, shift: Tensor) -> Tensor:
    """Move each image [N, C, h, w] by 3 - shift pixels (shift [N, 2]: right, down), with its border repeated."""
    count, _, height, width = images.shape
    padded = F.pad(images, (PAD, PAD, PAD, PAD), mode="replicate")
    rows = shift[:, 1, None] + torch.arange(height, device=images.device)
    columns = shift[:, 0, None] + torch.arange(width, device=images.device)
    batch = torch.arange(count, device=images.device)[:, None, None]
    return padded.movedim(1, -1)[batch, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
