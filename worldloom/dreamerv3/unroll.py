"""Gradients of the weights of a loop: one product for each weight, after all steps.

Ordinary differentiation of a loop forms every weight's gradient once per step, from a product over only B rows, and
adds these up: T writes of the whole gradient. Here the steps use weights without gradient. A tape keeps the inputs of
each linear map, and the gradient of its outputs arrives as the gradient of the array that it adds (its bias, as
[T, B, O]). When all steps are done, the weight's gradient is one product over T B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from worldloom import products

Product = Callable[[Tensor, Tensor], Tensor]  # (inputs [N, I], gradients of outputs [N, O]) -> gradient of the weight


class Tape:
    """The inputs of one linear map at every step, filled while the loop runs: [n, B, I] each, in order."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []

    def rows(self) -> Tensor:
        """Return the inputs of all steps, [T B, I]."""
        joined = self.inputs[0] if len(self.inputs) == 1 else torch.cat(self.inputs)
        return joined.flatten(0, 1)


class _Addend(torch.autograd.Function):
    """The identity on the array that a linear map adds; its backward pass forms the gradient of the map's weight."""

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
    """Return `rows` [T, B, O], the terms that a map adds at each step, so that `weight` gets its gradient from them."""
    added: Tensor = _Addend.apply(weight, rows, tape, product)  # type: ignore[no-untyped-call]
    return added


def linear_product(inputs: Tensor, gradients: Tensor) -> Tensor:
    """Return the gradient of a weight [O, I], from inputs [N, I] and gradients of outputs [N, O]."""
    return products.matmul(gradients.mT, inputs)
