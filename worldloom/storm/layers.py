"""STORM's layers: MLPs with layer norm, and a batch norm whose running statistics move only when told to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-5

Statistics = list[tuple[Tensor, Tensor]]  # mean and unbiased variance [C] of a batch, one pair for each batch norm


def mlp(inputs: int, units: int, layers: int) -> nn.Sequential:
    """Make `layers` times linear (without bias), layer norm, ReLU: [..., inputs] to [..., units]."""
    made: list[nn.Module] = []
    for layer in range(layers):
        made += [nn.Linear(inputs if layer == 0 else units, units, bias=False), nn.LayerNorm(units), nn.ReLU()]
    return nn.Sequential(*made)


def head(inputs: int, units: int, layers: int, outputs: int) -> nn.Sequential:
    """Make an MLP with a linear output: [..., inputs] to [..., outputs]."""
    return nn.Sequential(*mlp(inputs, units, layers), nn.Linear(units, outputs))


class BatchNorm(nn.Module):
    """Batch norm over all but the channels of [N, C, h, w], then ReLU.

    Learning passes a list, normalises with the batch's own statistics and leaves them in the list, so that a loss
    changes no buffer; `move_statistics` does. Without a list the running statistics are used.
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
            return F.relu(F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=NORM_EPS))
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        out = F.batch_norm(x, mean, var, self.weight, self.bias, training=True, momentum=1.0, eps=NORM_EPS)
        seen.append((mean, var))  # with a momentum of 1 the batch's own, variance unbiased
        return F.relu(out)


@torch.no_grad()
def move_statistics(norms: list[BatchNorm], seen: Statistics, rate: float, made: Tensor) -> None:
    """Move running statistics towards those of a batch, one pair for each norm: running += rate (seen - running).

    made: bool scalar; where it is False they stay, even if a batch's statistics are not finite.
    """
    for norm, (mean, var) in zip(norms, seen, strict=True):
        norm.running_mean.lerp_(torch.where(made, mean, norm.running_mean), rate)
        norm.running_var.lerp_(torch.where(made, var, norm.running_var), rate)
