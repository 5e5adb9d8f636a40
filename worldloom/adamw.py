"""AdamW for several parts of one agent, with a limit on each part's gradient; it reads nothing back to the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from worldloom.gang import ALONE
from worldloom.optim import flat_gradient, load_optimizer, views


@dataclass(frozen=True)
class Part:
    """One part of the agent, whose gradient is clipped by itself."""

    module: nn.Module
    clip: float  # limit of its gradient's norm
    decay: float  # weight decay of its matrices and kernels; biases, norms and embeddings have none

    def groups(self) -> list[dict[str, Any]]:
        """Return its parameters in two groups, with and without decay, as `torch.optim.AdamW` takes them."""
        layers = [layer for layer in self.module.modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.LSTMCell)]
        weights = {id(p) for layer in layers for name, p in layer.named_parameters() if name.startswith("weight")}
        decayed = [p for p in self.module.parameters() if id(p) in weights]
        others = [p for p in self.module.parameters() if id(p) not in weights]
        return [{"params": decayed, "weight_decay": self.decay}, {"params": others, "weight_decay": 0.0}]


class GuardedAdamW:
    """AdamW (Loshchilov & Hutter 2019) for several parts with gradients of their own, from one sum of losses.

    The learning rate grows from 0, in the first update, to `lr` over `warmup` updates. With a `gang` a step is made
    from the mean of its learners' gradients. A step that is not finite changes nothing. Nothing is read back to the
    host, so a step can be part of a CUDA graph.
    """

    def __init__(self, parts: Sequence[Part], lr: float, warmup: int) -> None:
        groups, self.gang = [part.groups() for part in parts], ALONE
        self.params: list[Tensor] = [p for both in groups for group in both for p in group["params"]]
        self._sizes = [sum(p.numel() for group in both for p in group["params"]) for both in groups]
        self._limits, self._lr, self._warmup = [part.clip for part in parts], lr, warmup
        device = self.params[0].device
        self._rate = torch.zeros((), device=device)
        every = [group for both in groups for group in both]
        self.adam = torch.optim.AdamW(every, lr=self._rate, fused=True, capturable=device.type == "cuda")

    def step(self, loss: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Make a step that lowers the scalar `loss`; return whether it was made, and each part's norm before clipping:
        scalars on the device."""
        flat, loss = self.gang.mean(flat_gradient(loss, self.params), loss)
        pieces = flat.split(self._sizes)
        norms = [torch.linalg.vector_norm(piece) for piece in pieces]
        made = torch.isfinite(torch.stack(norms).sum()) & torch.isfinite(loss)
        for piece, norm, limit in zip(pieces, norms, self._limits, strict=True):
            piece.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        for parameter, grad in zip(self.params, views(flat, self.params), strict=True):
            parameter.grad = grad
        self._rate.copy_(self._current_rate())
        self.adam.found_inf = (~made).float()  # type: ignore[attr-defined]  # torch's fused Adam skips where it is 1
        self.adam.step()
        return made, norms

    def _current_rate(self) -> Tensor:
        """Return lr min(1, k / warmup) after k updates, a scalar on the device."""
        state = self.adam.state.get(self.params[0])
        made = state["step"].to(self._rate) if state else torch.zeros_like(self._rate)
        return self._lr * (made / self._warmup).clamp(max=1.0) if self._warmup else torch.full_like(made, self._lr)

    def state_dict(self) -> dict[str, Any]:
        return self.adam.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a `state_dict`, but keep the settings that the optimiser was made with."""
        load_optimizer(self.adam, state)
