"""Inputs of the transformer layers of a TokenMixup model without mixing, for images of any size."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from ..saliency import eval_mode
from .labels import to_soft_targets, validate_label_shape
from .layers import detect_saliency
from .modeling_tokenmixup import TokenMixupModelMixin


class LayerInput(NamedTuple):
    """Arguments of a transformer layer.

    Attributes:
        hidden: (B, N, D) tokens.
        kwargs: other arguments, which the attention of the layer may depend on.
    """

    hidden: torch.Tensor
    kwargs: Mapping[str, Any]


def layer_inputs(model: TokenMixupModelMixin, pixel_values: torch.Tensor) -> list[LayerInput]:
    """Compute the input of each layer without mixing, in evaluation mode and without gradient.

    Args:
        model: ViT or CCT, loaded with `load_classifier`.
        pixel_values: (B, 3, H, W), normalized, of any size.

    Returns:
        The arguments of each layer.

    Raises:
        ValueError: if the model has no TokenMixup layers.
    """
    validate_tokenmixup_model(model)
    inputs: list[LayerInput] = []

    def record(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden, *mask = args
        inputs.append(LayerInput(hidden, kwargs | ({"attention_mask": mask[0]} if mask else {})))

    # `output_hidden_states` would leave hooks of transformers in the model, which may be in training.
    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in model.get_transformer_layers()]
    try:
        with eval_mode(model), torch.no_grad():
            model(pixel_values, **interpolation_kwargs(model, pixel_values))
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def layer_saliency(
    model: TokenMixupModelMixin,
    inputs: LayerInput,
    layer: int,
    *,
    gradient_fn: Callable[[], torch.Tensor],
    rollout_steps: int = 0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Compute the saliency of a layer's input by the detector of the model's settings, in evaluation mode.

    Args:
        model: ViT or CCT.
        inputs: arguments of the layer.
        layer: index of the layer.
        gradient_fn: returns the saliency (B, T) of the gradient detector, see `gradient_saliency_fn`.
        rollout_steps: number of additional layers in the attention rollout.
        generator: random number generator of the random detector; None uses torch's default generator.

    Returns:
        (B, T) saliency.
    """
    layers = list(model.get_transformer_layers())[layer : layer + rollout_steps + 1]
    with eval_mode(model):
        return detect_saliency(
            model.config,
            layers,
            inputs.hidden,
            gradient_fn=gradient_fn,
            generator=generator,
            layer_kwargs=inputs.kwargs,
        )


def gradient_saliency_fn(
    model: TokenMixupModelMixin, pixel_values: torch.Tensor, targets: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Return a function that computes the saliency (B, T) of the gradient detector in its first call.

    Args:
        model: ViT or CCT.
        pixel_values: (B, 3, H, W), normalized, of any size.
        targets: (B, C) class distributions.
    """
    kwargs = interpolation_kwargs(model, pixel_values)
    return cache(partial(model.compute_gradient_saliency, pixel_values, targets, **kwargs))


def soft_targets(model: TokenMixupModelMixin, labels: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Validate class indices (B,) or class distributions (B, C), and convert them to distributions.

    Args:
        model: ViT or CCT.
        labels: class indices or class distributions.
        batch_size: B.

    Raises:
        ValueError: if the shape, dtype or a value is invalid.
    """
    validate_label_shape(labels, batch_size, model.config.num_labels)
    return to_soft_targets(labels, model.config.num_labels)


def interpolation_kwargs(model: TokenMixupModelMixin, pixel_values: torch.Tensor) -> dict[str, bool]:
    """Return the keyword arguments of the model for images of another size than the configured one."""
    is_configured_size = tuple(pixel_values.shape[2:]) == model.config.network.image_size
    needs_argument = model.takes_interpolate_pos_encoding and not is_configured_size
    return {"interpolate_pos_encoding": True} if needs_argument else {}


def validate_tokenmixup_model(model: object) -> None:
    """Validate that a model has TokenMixup layers.

    Raises:
        ValueError: if it has none.
    """
    if not isinstance(model, TokenMixupModelMixin):
        raise ValueError(
            f"Expected a ViT or CCT with TokenMixup, loaded with load_classifier, got {type(model).__name__}."
        )


def validate_layer(model: TokenMixupModelMixin, layer: int, first: int = 0) -> None:
    """Validate that a model has a TokenMixup layer of this index.

    Args:
        model: ViT or CCT.
        layer: index of the layer.
        first: lowest valid index.

    Raises:
        ValueError: if it does not.
    """
    validate_tokenmixup_model(model)
    last = len(model.get_transformer_layers()) - 1
    if not first <= layer <= last:
        reason = " (layer 0 has no earlier layers)" if first and layer == 0 else ""
        raise ValueError(f"layer must be between {first} and {last}, got {layer}{reason}.")
