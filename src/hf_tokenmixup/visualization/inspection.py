"""Inspection of TokenMixup in a model: saliency maps, mixed batches, and tokens collected for vertical layers.

The model is in evaluation mode, without dropout, and no parameter receives a gradient. Shapes: B images, R x K token
grid with T patch tokens, C classes.
"""

from dataclasses import dataclass

import torch

from ..functional import difficulty, select_salient_tokens
from ..horizontal import horizontal_mix_from_config
from ..models import TokenMixupModelMixin
from ..models.layer_inputs import (
    gradient_saliency_fn,
    interpolation_kwargs,
    layer_inputs,
    layer_saliency,
    soft_targets,
    validate_layer,
)
from ..saliency import attention_saliency, eval_mode


@dataclass(frozen=True)
class HorizontalMixTrace:
    """Result of a horizontal step on a batch.

    `rho`, `detector`, `token_selection` and `relabel` are settings of `TokenMixupConfigMixin`.

    Attributes:
        layer: Index of the layer after the step.
        rho: Minimum difference in saliency of a replaced token.
        detector: Saliency detector.
        token_selection: Selection of replaced tokens.
        relabel: Mixing of labels.
        easy: (B,) bool, images that may be mixed.
        saliency: (B, R, K) saliency of the layer's input.
        partner: (B,) int64, index of each image's partner; its own index if it is not mixed.
        replaced: (B, R, K) bool, tokens taken from the partner.
        targets: (B, C) class probabilities before the step.
        mixed_targets: (B, C) class probabilities after the step.
    """

    layer: int
    rho: float
    detector: str
    token_selection: str
    relabel: str
    easy: torch.Tensor
    saliency: torch.Tensor
    partner: torch.Tensor
    replaced: torch.Tensor
    targets: torch.Tensor
    mixed_targets: torch.Tensor

    @property
    def mixed(self) -> list[int]:
        """Indices of the images with replaced tokens."""
        return self.replaced.flatten(1).any(dim=1).nonzero().flatten().tolist()


@dataclass(frozen=True)
class VerticalMemoryTrace:
    """Tokens of earlier layers that a vertical layer attends to.

    Attributes:
        layer: Index of the vertical layer, L.
        grid: R and K.
        tokens: (L, B, kappa) int64, indices of salient patch tokens in row-major order, by earlier layer and image.
            The most salient token is first.
    """

    layer: int
    grid: tuple[int, int]
    tokens: torch.Tensor


def predicted_classes(model: TokenMixupModelMixin, pixel_values: torch.Tensor) -> torch.Tensor:
    """Predict the classes of images (B, 3, H, W) of any size, as (B,) int64."""
    with eval_mode(model), torch.no_grad():
        return model(pixel_values, **interpolation_kwargs(model, pixel_values)).logits.argmax(dim=1)


def saliency_maps(
    model: TokenMixupModelMixin, pixel_values: torch.Tensor, targets: torch.Tensor, layer: int
) -> dict[str, torch.Tensor]:
    """Compute the saliency of a layer's input by three detectors (Figure 3 of the paper).

    Args:
        model: ViT or CCT, loaded with `load_classifier`.
        pixel_values: (B, 3, H, W), normalized, of any size.
        targets: Class indices (B,) or probabilities (B, C) for the gradient of the loss.
        layer: Index of the layer.

    Returns:
        Unscaled saliency (B, R, K) by `gradient` (of the loss with respect to the pixels, equal for all layers),
        `1-step` (attention of this layer) and `full rollout` (attention through this and all later layers).

    Raises:
        ValueError: The layer does not exist, or the targets are invalid.
    """
    validate_layer(model, layer)
    targets = soft_targets(model, targets, len(pixel_values))
    config, layers = model.config, list(model.get_transformer_layers())[layer:]
    hidden, layer_kwargs = layer_inputs(model, pixel_values)[layer]
    kwargs = interpolation_kwargs(model, pixel_values)
    prefix, query = config.num_prefix_tokens, config.effective_saliency_query
    with eval_mode(model):
        maps = {"gradient": model.compute_gradient_saliency(pixel_values, targets, **kwargs)} | {
            name: attention_saliency(through, hidden, prefix, query, layer_kwargs=layer_kwargs)
            for name, through in (("1-step", layers[:1]), ("full rollout", layers))
        }
    return {name: _reshape_to_grid(model, saliency, pixel_values) for name, saliency in maps.items()}


def min_max(maps: torch.Tensor) -> torch.Tensor:
    """Scale each map (B, R, K) to [0, 1]. A constant map becomes 0."""
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 0.0)


def trace_horizontal_mixup(
    model: TokenMixupModelMixin,
    pixel_values: torch.Tensor,
    targets: torch.Tensor,
    layer: int,
    *,
    tau: float | None = None,
    rho: float | None = None,
    generator: torch.Generator | None = None,
) -> HorizontalMixTrace:
    """Apply a horizontal step with the model's settings before any layer (Figure 1 of the paper).

    Args:
        model: ViT or CCT, loaded with `load_classifier`.
        pixel_values: (B, 3, H, W), normalized, of any size.
        targets: Class indices (B,) or probabilities (B, C).
        layer: Index of the layer.
        tau: Images with a ScoreNet loss below this value in nats are easy and may be mixed. None: all images.
        rho: Minimum difference in saliency of a replaced token. None: that of the model.
        generator: Random generator for settings with random choices.

    Returns:
        The saliency, partners, replaced tokens and targets of the step.

    Raises:
        ValueError: The layer does not exist, the targets are invalid, rho is negative, or tau is set and the layer has
            no ScoreNet.
    """
    validate_layer(model, layer)
    config = model.config
    targets = soft_targets(model, targets, len(pixel_values))
    inputs = layer_inputs(model, pixel_values)[layer]
    hidden = inputs.hidden
    saliency = layer_saliency(
        model,
        inputs,
        layer,
        gradient_fn=gradient_saliency_fn(model, pixel_values, targets),
        rollout_steps=config.rollout_steps,
        generator=generator,
    )
    rho = config.effective_rho(saliency.shape[1]) if rho is None else rho
    easy = _select_easy(model, hidden, targets, layer, tau)
    mix, *_ = horizontal_mix_from_config(hidden, targets, saliency, easy, config, rho=rho, generator=generator)
    return HorizontalMixTrace(
        layer=layer,
        rho=rho,
        detector=config.saliency_detector,
        token_selection=config.token_selection,
        relabel=config.relabel,
        easy=easy,
        saliency=_reshape_to_grid(model, saliency, pixel_values),
        partner=mix.partner,
        replaced=_reshape_to_grid(model, mix.replaced, pixel_values),
        targets=targets,
        mixed_targets=mix.targets,
    )


def trace_vertical_memory(
    model: TokenMixupModelMixin,
    pixel_values: torch.Tensor,
    targets: torch.Tensor,
    layer: int,
    *,
    kappa: int | None = None,
    generator: torch.Generator | None = None,
) -> VerticalMemoryTrace:
    """Select the tokens of earlier layers that a vertical layer attends to, without HTM (Figure 2 of the paper).

    Args:
        model: ViT or CCT, loaded with `load_classifier`.
        pixel_values: (B, 3, H, W), normalized, of any size.
        targets: Class indices (B,) or probabilities (B, C). Only the gradient detector depends on them.
        layer: Index of the layer, at least 1.
        kappa: Number of tokens per earlier layer. None: that of the model.
        generator: Random generator for the random detector.

    Returns:
        The selected tokens.

    Raises:
        ValueError: The layer is 0 or does not exist, the targets are invalid, or kappa is out of range.
    """
    validate_layer(model, layer, first=1)
    config = model.config
    targets = soft_targets(model, targets, len(pixel_values))
    kappa = config.vertical_kappa if kappa is None else kappa
    grid = model.token_grid(*pixel_values.shape[2:])
    if not 1 <= kappa <= grid[0] * grid[1]:
        raise ValueError(f"kappa must be between 1 and the number of patch tokens, {grid[0] * grid[1]}, got {kappa}.")
    positions = torch.arange(grid[0] * grid[1], device=pixel_values.device).expand(len(pixel_values), -1)[..., None]
    gradient_fn = gradient_saliency_fn(model, pixel_values, targets)
    selected = []
    for index, inputs in enumerate(layer_inputs(model, pixel_values)[:layer]):
        saliency = layer_saliency(model, inputs, index, gradient_fn=gradient_fn, generator=generator)
        selected.append(select_salient_tokens(positions, saliency, kappa, num_prefix_tokens=0)[..., 0])
    return VerticalMemoryTrace(layer=layer, grid=grid, tokens=torch.stack(selected))


def _select_easy(model, hidden, targets, layer, tau) -> torch.Tensor:
    if tau is None:
        return torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    scorenet = getattr(model.get_transformer_layers()[layer], "scorenet", None)
    if scorenet is None:
        raise ValueError(
            f"tau needs a ScoreNet, but layer {layer} has none (horizontal_layers is "
            f"{model.config.horizontal_layers}). Omit tau to mix every image."
        )
    with torch.no_grad():
        return difficulty(scorenet(hidden), targets) < tau


def _reshape_to_grid(model: TokenMixupModelMixin, tokens: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    return tokens.unflatten(1, model.token_grid(*pixel_values.shape[2:]))
