"""A linear layer whose values are known, because those of its input's rows were computed before."""

from typing import Any

import torch


class KnownProjection(torch.autograd.Function):
    """Linear layer without bias that returns given values. Only its gradients are computed.

    `KnownProjection.apply(hidden, weight, values)` takes tokens (B, N, D), a weight (E, D), and the values (B, N, E)
    of `torch.nn.functional.linear(hidden, weight)`. It returns these values. They have no gradient of their own.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        rows = grad.flatten(0, 1)
        grad_hidden = (rows @ weight).view_as(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = rows.mT @ hidden.flatten(0, 1) if ctx.needs_input_grad[1] else None
        return grad_hidden, grad_weight, None
