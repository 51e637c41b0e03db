"""How weights and batches lie in memory, and what a compiler may expect of them; no value changes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def channels_last(images: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) with their channels last in memory; another tensor as it is."""
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


def align_optimizer_state_format(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer's moments the memory format of their weights, which a checkpoint may have had otherwise.

    A fused optimizer goes through both in the order of memory: in another format it would update by the wrong moments.
    """
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == weight.shape and value.stride() != weight.stride():
                state[name] = torch.empty_like(weight, dtype=value.dtype, device=value.device).copy_(value)


def mark_dynamic_batch_size(*tensors: torch.Tensor) -> None:
    """Have ``torch.compile`` build one graph for every number of rows, where the model allows it.

    Without, the last batch of an epoch, which is smaller, is compiled for anew.
    """
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


@contextmanager
def restore_weights_on_exit(model: nn.Module) -> Iterator[None]:
    """Within it, `model` may be turned into another dtype; behind it, it has the tensors that it had."""
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
