"""Helpers for memory formats and `torch.compile`; they change no values."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def channels_last(images: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) in channels-last memory format; a tensor with other dimensions is unchanged."""
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


def align_optimizer_state_format(optimizer: torch.optim.Optimizer) -> None:
    """Convert an optimizer's moments to the memory format of their weights, which may differ after loading.

    Fused optimizers index both by memory order, so the strides must be equal.
    """
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == weight.shape and value.stride() != weight.stride():
                state[name] = torch.empty_like(weight, dtype=value.dtype, device=value.device).copy_(value)


def mark_dynamic_batch_size(*tensors: torch.Tensor) -> None:
    """Let `torch.compile` build one graph for all batch sizes, if the model allows it.

    Otherwise the smaller last batch of an epoch triggers a recompile.
    """
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


@contextmanager
def restore_weights_on_exit(model: nn.Module) -> Iterator[None]:
    """Restore the tensors of weights and buffers on exit, so that `model` may be converted to another dtype."""
    weights = [(weight, weight.data) for weight in model.parameters()]
    buffers = [
        (module, name, tensor)
        for module in model.modules()
        for name, tensor in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    try:
        yield
    finally:
        for weight, data in weights:
            weight.data = data
        for module, name, tensor in buffers:
            setattr(module, name, tensor)
