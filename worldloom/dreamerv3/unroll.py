"""Weights that a loop uses at every step, with one product for the gradient of each after the loop.

Differentiating a loop step by step forms every weight's gradient once a step, each from a product over B rows only, and
adds them up: T times a write of the whole gradient. Here the steps use weights without gradient. What each linear map
reads is kept, and what reaches its output in the backward pass arrives as the gradient of the array that it adds to
(its bias, as [T, B, O]); when all steps are done, the weight's gradient is one product over T B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]  # (inputs [N, I], gradients of outputs [N, O]) -> gradient of the weight


class Tape:
    """What one linear map reads at every step, filled while the loop runs: [n, B, I] each, in order."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []

    def rows(self) -> Tensor:
        """[T B, I]"""
        joined = self.inputs[0] if len(self.inputs) == 1 else torch.cat(self.inputs)
        return joined.flatten(0, 1)


class _Addend(torch.autograd.Function):
    """Passes on what a linear map adds to; its backward pass knows the gradient of every step's output."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, addend: Tensor, tape: Tape, product: Product) -> Tensor:
        ctx.tape, ctx.product, ctx.dtype = tape, product, weight.dtype
        return addend.view_as(addend)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        inputs = ctx.tape.rows().to(gradient.dtype)
        formed = ctx.product(inputs, gradient.flatten(0, 1)).to(ctx.dtype)
        return formed, gradient, None, None


def addend(weight: Tensor, rows: Tensor, tape: Tape, product: Product) -> Tensor:
    """rows [T, B, O], what the map with this weight adds to at each step; brings the weight its gradient."""
    added: Tensor = _Addend.apply(weight, rows, tape, product)  # type: ignore[no-untyped-call]
    return added


def linear_product(inputs: Tensor, gradients: Tensor) -> Tensor:
    """For weights [O, I]."""
    return gradients.mT @ inputs
