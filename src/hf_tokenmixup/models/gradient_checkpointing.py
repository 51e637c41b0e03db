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
from transformers import PreTrainedConfig, PreTrainedModel


class ActivationCheckpointing:
    """Both names of gradient checkpointing for a `PreTrainedModel`, which this class precedes among the bases.

    transformers calls it activation checkpointing since 5.23 and deprecates the name gradient checkpointing. Here
    both names exist with every version. Reading `is_gradient_checkpointing`, as peft does, gives no warning.
    """

    if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):

        def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict[str, Any] | None = None):
            self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

        def activation_checkpointing_disable(self):
            self.gradient_checkpointing_disable()

    @property
    def is_activation_checkpointing(self) -> bool:
        return is_checkpointed(self)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return is_checkpointed(self)


def enable_checkpointing(model: nn.Module, settings: dict[str, Any] | None = None) -> None:
    """Turn on gradient checkpointing of a model of transformers, by the name that its version has for it.

    Args:
        model: any `PreTrainedModel`.
        settings: Keyword arguments of `torch.utils.checkpoint.checkpoint`.
    """
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(settings)
    else:
        model.gradient_checkpointing_enable(settings)


def is_checkpointed(model: nn.Module) -> bool:
    """Whether any layer of a model is under gradient checkpointing."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def rename_in_config(config: PreTrainedConfig) -> None:
    """Replace the attribute `activation_checkpointing` of a configuration by `gradient_checkpointing`, in place.

    Every version of transformers reads the latter when it builds a model, and then removes it.
    """
    if vars(config).pop("activation_checkpointing", False):
        config.gradient_checkpointing = True


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
