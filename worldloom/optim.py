"""Optimisers that read nothing back to the host: LaProp with adaptive clipping (DreamerV3), guarded Adam (TD-MPC2)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from worldloom.gang import ALONE


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load `state` but keep the optimizer's own settings, so that a resumed run may lower its learning rate."""
    progress = ("params", "steps")
    own = [{k: v for k, v in group.items() if k not in progress} for group in optimizer.param_groups]
    optimizer.load_state_dict(copy.deepcopy(dict(state)))  # torch keeps the tensors that it is given
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def flat_gradient(loss: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Return the gradient of a scalar by all `params` as one flat array [P]."""
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, params)])


def views(flat: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Return views of `flat` [P], one of each parameter's shape, without a copy."""
    pieces = flat.split([p.numel() for p in params])
    return [piece.view(p.shape) for piece, p in zip(pieces, params, strict=True)]


@torch.no_grad()
def move_towards(slow: Iterable[Tensor], online: Iterable[Tensor], rate: Tensor) -> None:
    """Move slow copies in place: slow += rate (online - slow). rate: scalar on the device."""
    targets = list(slow)
    distance = torch._foreach_sub(list(online), targets)
    torch._foreach_mul_(distance, rate)
    torch._foreach_add_(targets, distance)


class GuardedAdam:
    """Adam (Kingma & Ba 2015) with a limit on the gradient's global norm; a step that is not finite changes nothing.

    groups: parameters as `torch.optim.Adam` takes them. With a `gang` a step is made from the mean of its learners'
    gradients. Nothing is read back to the host, so a step can be part of a
    CUDA graph.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, eps: float, max_norm: float) -> None:
        self.params: list[Tensor] = [p for group in groups for p in group["params"]]
        self._max_norm, cuda = max_norm, self.params[0].is_cuda
        self.gang = ALONE
        self.adam = torch.optim.Adam(groups, lr=lr, eps=eps, fused=True, capturable=cuda)

    def step(self, loss: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Make a step that lowers the scalar `loss`; where `allowed`, a bool scalar, is False, change nothing.

        Returns whether the step was made, and the norm before clipping: scalars on the device.
        """
        flat, loss = self.gang.mean(flat_gradient(loss, self.params), loss)
        norm = torch.linalg.vector_norm(flat)
        made = torch.isfinite(norm) & torch.isfinite(loss)
        made = made if allowed is None else made & allowed
        flat.mul_((self._max_norm / (norm + 1e-6)).clamp(max=1.0))
        for parameter, grad in zip(self.params, views(flat, self.params), strict=True):
            parameter.grad = grad
        self.adam.found_inf = (~made).float()  # type: ignore[attr-defined]  # torch's fused Adam skips where it is 1
        self.adam.step()
        return made, norm

    @torch.no_grad()
    def update_norm(self) -> Tensor:
        """Return the norm of the last change of all parameters, a scalar on the device; 0 before the first step.

        It follows from Adam's state, so that steps do nothing for it: with m, v of step k, the change of a parameter is
        lr (m / (1 - beta1^k)) / (sqrt(v / (1 - beta2^k)) + eps).
        """
        norms = [torch.zeros((), device=self.params[0].device)]
        for group in self.adam.param_groups:
            states = [state for p in group["params"] if (state := self.adam.state.get(p))]
            if not states:
                continue
            (beta1, beta2), steps = group["betas"], states[0]["step"].to(self.params[0].device)
            sizes = torch._foreach_sqrt([state["exp_avg_sq"] for state in states])
            torch._foreach_div_(sizes, (1 - beta2**steps).sqrt())
            torch._foreach_add_(sizes, group["eps"])
            change = torch._foreach_div([state["exp_avg"] for state in states], sizes)
            norms.append(torch.stack(torch._foreach_norm(change)).norm() * group["lr"] / (1 - beta1**steps))
        whole: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return whole


class LaProp(torch.optim.Optimizer):
    """LaProp (Ziyin et al. 2020), normalisation before momentum, after adaptive gradient clipping (Brock et al. 2021).

    For each tensor p with gradient g, in update k:
        g = g / max(1, |g| / (clip max(1e-3, |p|)))    clipping, with norms of whole tensors
        u = g / (sqrt(v) + eps)                        v: running mean of g^2 (beta2), debiased
        p = p - min(1, (k - 1) / warmup) lr m          m: running mean of u (beta1), debiased
    so the first update changes nothing if warmup > 0.

    Everything that changes from step to step lives on the parameters' device, so a step can be part of a CUDA graph.
    Momentum and squares are one flat array each. A step from a gradient that is not finite changes nothing.
    Raises ValueError for several groups of parameters.
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
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "clip": clip, "warmup": warmup})
        if len(self.param_groups) != 1:
            raise ValueError(f"LaProp has {len(self.param_groups)} groups of parameters, expected one list of tensors.")
        tensors: list[Tensor] = self.param_groups[0]["params"]
        for p in tensors:
            self.state[p] = {"momentum": torch.zeros_like(p), "square": torch.zeros_like(p)}
        self.param_groups[0]["steps"] = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
        self._set_up()

    def _set_up(self) -> None:
        """Make the flat arrays from the state of each parameter."""
        self.params: list[Tensor] = self.param_groups[0]["params"]
        self._momentum, self._square = (
            torch.cat([self.state[p][name].flatten() for p in self.params]) for name in ("momentum", "square")
        )
        self.change = laprop_  # may be replaced by its compiled form
        self.update_norm = torch.zeros(())  # of the last step, over all parameters
        self._keep_state_flat()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set up a copy, of which torch keeps no more than groups and state."""
        super().__setstate__(state)
        if not hasattr(self, "params"):  # torch calls this to load a state, too
            self._set_up()

    def _keep_state_flat(self) -> None:
        parts = zip(self.params, views(self._momentum, self.params), views(self._square, self.params), strict=True)
        for p, momentum, square in parts:
            self.state[p] = {"momentum": momentum, "square": square}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state into the same flat arrays and step counter, which a CUDA graph may use."""
        steps = self.param_groups[0]["steps"]
        super().load_state_dict(state_dict)
        loaded = self.param_groups[0]["steps"]
        self.param_groups[0]["steps"] = steps.copy_(torch.as_tensor(loaded, dtype=torch.float64))
        for name, flat in (("momentum", self._momentum), ("square", self._square)):
            # an optimiser that was saved before its first step has no state
            parts = [self.state[p].get(name, torch.zeros_like(p)).flatten() for p in self.params]
            flat.copy_(torch.cat(parts))
        self._keep_state_flat()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002 - no closures here
        """Make a step from the parameters' own `.grad`."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        self.apply(torch.cat([grad.flatten() for grad in grads]))

    @torch.no_grad()
    def apply(self, flat: Tensor, finite: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Make a step from a flat gradient [P], which is overwritten; where `finite`, a bool scalar, is False, skip it.

        Returns whether the step was made, and the norm of the whole gradient before clipping: scalars on the device.
        """
        group = self.param_groups[0]
        grad_norms = torch.stack(torch._foreach_norm(views(flat, self.params)))
        made = torch.isfinite(grad_norms.sum())
        if finite is not None:
            made = made & finite
        self.change(self.params, flat, grad_norms, self._momentum, self._square, group["steps"], made, group)
        self.update_norm = torch.linalg.vector_norm(flat)  # of the change, which is left in it
        return made, grad_norms.square().sum().sqrt()


def laprop_(
    params: list[Tensor],
    flat: Tensor,
    grad_norms: Tensor,
    momentum: Tensor,
    square: Tensor,
    steps: Tensor,
    made: Tensor,
    settings: Mapping[str, Any],
) -> None:
    """Update all parameters in place from their flat gradient [P], which is overwritten; see `LaProp`.

    grad_norms: [tensors]; momentum, square: [P]; steps: float64 scalar, updates so far; made: bool scalar, False leaves
    everything as it is; settings: those of the group.
    """
    beta1, beta2 = settings["betas"]
    steps += made
    count = steps.clamp(min=1)
    rate = settings["lr"] * made
    if settings["warmup"]:
        rate = rate * ((steps - 1) / settings["warmup"]).clamp(0, 1)
    limits = settings["clip"] * torch.stack(torch._foreach_norm(params)).clamp(min=1e-3)
    shrink = (grad_norms / limits).clamp(min=1.0)
    flat.copy_(torch.where(made, flat, 0.0))
    torch._foreach_div_(views(flat, params), list(torch.where(made, shrink, 1.0).unbind()))
    square.mul_(torch.where(made, beta2, 1.0)).addcmul_(flat, flat, value=1 - beta2)
    size = (square / (1 - beta2**count).to(square.dtype)).sqrt_().add_(settings["eps"])
    momentum.mul_(torch.where(made, beta1, 1.0)).add_(flat.div_(size), alpha=1 - beta1)
    change = torch.mul(momentum, (-rate / (1 - beta1**count)).to(momentum.dtype), out=flat)
    torch._foreach_add_(params, views(change, params))
