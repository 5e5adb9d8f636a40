"""STORM's MLPs, initialised as torch does."""

from __future__ import annotations

from torch import nn


def mlp(inputs: int, units: int, layers: int) -> nn.Sequential:
    """Make `layers` times linear (without bias), layer norm, ReLU: [..., inputs] to [..., units]."""
    made: list[nn.Module] = []
    for layer in range(layers):
        made += [nn.Linear(inputs if layer == 0 else units, units, bias=False), nn.LayerNorm(units), nn.ReLU()]
    return nn.Sequential(*made)


def head(inputs: int, units: int, layers: int, outputs: int) -> nn.Sequential:
    """Make an MLP with a linear output: [..., inputs] to [..., outputs]."""
    return nn.Sequential(*mlp(inputs, units, layers), nn.Linear(units, outputs))
