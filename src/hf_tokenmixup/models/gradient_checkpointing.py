"""Gradient checkpointing of layers whose input needs no gradient, as after frozen embeddings or frozen layers.

The reentrant kind of `torch.utils.checkpoint` computes the gradients of a layer's weights only if one of the tensors
that enter the layer requires a gradient. Otherwise the weights stay untrained, with a warning of torch only. The other
kind has no such condition and gives the same gradients, so it takes over for these layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn


def checkpoint_layer(checkpoint: Callable, function: Callable, *inputs: Any) -> Any:
    """Run a function of a layer under gradient checkpointing, with the gradients that it has without.

    Args:
        checkpoint: `torch.utils.checkpoint.checkpoint` with its settings, as transformers gives it to a layer.
        function: what is run, and run again in the backward pass.
        inputs: of `function`.

    Returns:
        What `function` returns.
    """
    if _is_reentrant(checkpoint) and not any(torch.is_tensor(value) and value.requires_grad for value in inputs):
        checkpoint = partial(checkpoint.func, **checkpoint.keywords | {"use_reentrant": False})
    return checkpoint(function, *inputs)


def checkpoint_frozen_inputs(model: nn.Module) -> None:
    """Make every layer of a plain model of transformers that is checkpointed use :func:`checkpoint_layer`.

    To be called after gradient checkpointing was turned on. Layers that mix tokens do so by themselves.
    """
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if _is_reentrant(checkpoint):
            module._gradient_checkpointing_func = partial(checkpoint_layer, checkpoint)


def _is_reentrant(checkpoint: Callable | None) -> bool:
    """Whether this is the reentrant kind with its settings, which is the kind that torch takes unless told."""
    is_configured = isinstance(checkpoint, partial) and checkpoint.func is not checkpoint_layer
    return is_configured and checkpoint.keywords.get("use_reentrant") is not False
