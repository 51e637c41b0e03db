"""A linear layer whose output was computed before, for the same tokens in another order."""

from typing import Any

import torch


class KnownProjection(torch.autograd.Function):
    """Linear layer without bias that takes its output instead of computing it. It computes the gradients only.

    `KnownProjection.apply(hidden, weight, values)` takes tokens (B, N, D), a weight (E, D), and the output (B, N, E)
    of `torch.nn.functional.linear(hidden, weight)`, without gradient. It returns this output.
    """

    @staticmethod
    def forward(hidden: torch.Tensor, weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        hidden, weight, _ = inputs
        ctx.save_for_backward(hidden, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        rows = grad.flatten(0, 1)
        grad_hidden = (rows @ weight).view_as(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = rows.mT @ hidden.flatten(0, 1) if ctx.needs_input_grad[1] else None
        return grad_hidden, grad_weight, None
