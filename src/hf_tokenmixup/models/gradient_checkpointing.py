"""Gradient checkpointing of layers whose input requires no gradient, as after frozen embeddings or frozen layers.

Reentrant checkpointing of `torch.utils.checkpoint` computes the gradients of a layer's weights only if one of its
input tensors requires a gradient. Otherwise the weights are not trained, and torch only logs a warning. Non-reentrant
checkpointing has no such condition and gives the same gradients, so it is used for these layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class ActivationCheckpointing:
    """Mixin with both names of gradient checkpointing. Precedes `PreTrainedModel` among the base classes.

    Since 5.23 transformers calls it activation checkpointing and deprecates the old name. With this mixin both names
    exist in every version, and reading `is_gradient_checkpointing`, as peft does, gives no warning.
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
    """Turn on gradient checkpointing with the method of the installed version of transformers.

    Args:
        model: a `PreTrainedModel`.
        settings: keyword arguments of `torch.utils.checkpoint.checkpoint`.
    """
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(settings)
    else:
        model.gradient_checkpointing_enable(settings)


def is_checkpointed(model: nn.Module) -> bool:
    """Whether any layer of a model uses gradient checkpointing."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def rename_in_config(config: PreTrainedConfig) -> None:
    """Rename the attribute `activation_checkpointing` of a configuration to `gradient_checkpointing`, in place.

    Every version of transformers reads the latter when it creates a model, and then removes it.

    Args:
        config: configuration of the model.
    """
    if vars(config).pop("activation_checkpointing", False):
        config.gradient_checkpointing = True


def checkpoint_layer(checkpoint: Callable, function: Callable, *inputs: Any) -> Any:
    """Run a function with gradient checkpointing. If no input requires a gradient, use the non-reentrant variant.

    Args:
        checkpoint: `torch.utils.checkpoint.checkpoint` with its settings, as transformers passes it to a layer.
        function: function to run, and to run again in the backward pass.
        inputs: arguments of `function`.

    Returns:
        The return value of `function`.
    """
    if _is_reentrant(checkpoint) and not any(torch.is_tensor(value) and value.requires_grad for value in inputs):
        checkpoint = partial(checkpoint.func, **checkpoint.keywords | {"use_reentrant": False})
    return checkpoint(function, *inputs)


def checkpoint_frozen_inputs(model: nn.Module) -> None:
    """Let all checkpointed layers of a model use `checkpoint_layer`, in place.

    Call this after gradient checkpointing is turned on. TokenMixup layers call `checkpoint_layer` themselves.

    Args:
        model: model of transformers.
    """
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if _is_reentrant(checkpoint):
            module._gradient_checkpointing_func = partial(checkpoint_layer, checkpoint)


def _is_reentrant(checkpoint: Callable | None) -> bool:
    """Whether a checkpoint function with settings is reentrant, which is the default of torch."""
    is_configured = isinstance(checkpoint, partial) and checkpoint.func is not checkpoint_layer
    return is_configured and checkpoint.keywords.get("use_reentrant") is not False
