"""LaProp with adaptive gradient clipping: DreamerV3's optimiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Go on from `state` with the optimizer's own settings: a resumed run may lower its learning rate."""
    progress = ("params", "steps")
    own = [{k: v for k, v in group.items() if k not in progress} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


class LaProp(torch.optim.Optimizer):
    """Clip each tensor's gradient to a share of its own norm, normalise by its running size, then take momentum.

    Adaptive gradient clipping: Brock et al. 2021, whole tensors. LaProp: Ziyin et al. 2020, normalisation before
    momentum. The learning rate warms up linearly from 0 over `warmup` updates, so the first update changes nothing.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 4e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-20,
        clip: float = 0.3,
        warmup: int = 1000,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "clip": clip, "warmup": warmup, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002 - no closures here
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"momentum": torch.zeros_like(p), "square": torch.zeros_like(p)}
            momenta = [self.state[p]["momentum"] for p in params]
            squares = [self.state[p]["square"] for p in params]
            group["steps"] += 1
            rate = (
                group["lr"] * min((group["steps"] - 1) / max(group["warmup"], 1), 1.0)
                if group["warmup"]
                else group["lr"]
            )
            if params:
                laprop_(params, grads, momenta, squares, group, rate)


def laprop_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    squares: list[Tensor],
    group: dict[str, Any],
    rate: float,
) -> None:
    """One update of all tensors in place."""
    (beta1, beta2), steps = group["betas"], group["steps"]
    limits = torch._foreach_clamp_min(torch._foreach_norm(params), 1e-3)
    torch._foreach_mul_(limits, group["clip"])
    shrink = torch._foreach_div(torch._foreach_norm(grads), limits)
    grads = list(torch._foreach_div(grads, torch._foreach_clamp_min(shrink, 1.0)))
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    sizes = torch._foreach_div(squares, 1 - beta2**steps)
    torch._foreach_sqrt_(sizes)
    torch._foreach_add_(sizes, group["eps"])
    torch._foreach_div_(grads, sizes)
    torch._foreach_mul_(momenta, beta1)
    torch._foreach_add_(momenta, grads, alpha=1 - beta1)
    torch._foreach_add_(params, momenta, alpha=-rate / (1 - beta1**steps))
