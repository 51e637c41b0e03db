"""Effect of single values of rho, tau and kappa in a layer.

Shapes: B images of a batch, T patch tokens, N tokens with the prefix tokens, D hidden size, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..configuration import TokenMixupConfigMixin
from ..functional import (
    label_weights,
    optimal_assignment,
    random_assignment,
    random_replace_mask,
    replace_mask,
    saliency_gain,
    upcast_to_float32,
)
from ..models.layers import TokenMixupLayerMixin


@dataclass(frozen=True)
class HorizontalForecast:
    """Horizontal mixing at one value of rho if every image is easy.

    Attributes:
        horizontal_rho_relative: rho as a multiple of 1 / T.
        horizontal_rho: rho as an attention probability.
        images_mixed: Fraction of images with a replaced token.
        tokens_replaced: Fraction of patch tokens that are replaced, mean over the mixed images; 0 if there are none.
        label_mass: Weight of the partner's label, mean over the mixed images; 0 if there are none.
        matched_gain: Eq. (6) with the partners of the optimal assignment, mean over the images.
        random_gain: Eq. (6) with random partners, mean over the images and over all partners.
    """

    horizontal_rho_relative: float
    horizontal_rho: float
    images_mixed: float
    tokens_replaced: float
    label_mass: float
    matched_gain: float
    random_gain: float


@dataclass(frozen=True)
class EasyForecast:
    """Easy images at one value of tau.

    Attributes:
        horizontal_tau_relative: tau as a fraction of ln C.
        horizontal_tau: tau in nats.
        easy_images: Fraction of images with a difficulty below tau.
    """

    horizontal_tau_relative: float
    horizontal_tau: float
    easy_images: float


@dataclass(frozen=True)
class VerticalForecast:
    """Vertical attention at one value of kappa.

    Attributes:
        vertical_kappa: Number of tokens of each earlier layer.
        collected_tokens: Number of tokens of all earlier layers.
        attention_mass: Attention to these tokens, mean over queries, heads and images.
    """

    vertical_kappa: int
    collected_tokens: int
    attention_mass: float


@dataclass(frozen=True)
class LayerCalibration:
    """Measurements of one layer.

    Attributes:
        layer: Index of the layer.
        saliency_mean: Mean saliency of a patch token.
        saliency_std: Standard deviation over the patch tokens of all images.
        saliency_mean_relative: Mean as a multiple of 1 / T.
        saliency_std_relative: Standard deviation as a multiple of 1 / T.
        patch_attention: Sum of the saliency over the patch tokens, mean over the images. With the attention detector,
            this is the fraction of attention that patch tokens receive.
        scorenet: `"trained"`, the ScoreNet of the layer, or `"fitted"`, see `fit_scorenet_difficulty`.
        difficulty: Mean difficulty in nats.
        rho: Forecasts by increasing rho.
        tau: Forecasts by increasing tau.
        kappa: Forecasts by increasing kappa; empty for layer 0.
    """

    layer: int
    saliency_mean: float
    saliency_std: float
    saliency_mean_relative: float
    saliency_std_relative: float
    patch_attention: float
    scorenet: str
    difficulty: float
    rho: tuple[HorizontalForecast, ...]
    tau: tuple[EasyForecast, ...]
    kappa: tuple[VerticalForecast, ...]


def forecast_horizontal(
    saliency: Sequence[torch.Tensor],
    rho: float,
    config: TokenMixupConfigMixin,
    generator: torch.Generator | None = None,
) -> HorizontalForecast:
    """Forecast horizontal mixing at one value of rho if every image is easy.

    Args:
        saliency: (B, T) saliency of each batch.
        rho: Minimum difference in saliency of a replaced token.
        config: Model configuration. Its assignment, selection of tokens and relabeling are used.
        generator: Random number generator of the random choices; None uses torch's default generator.
    """
    counts = torch.zeros(5, dtype=torch.float64)
    for batch in saliency:
        easy = torch.ones(len(batch), dtype=torch.bool, device=batch.device)
        gain = saliency_gain(batch, rho)
        matched = optimal_assignment(gain, easy, config.assignment_group_size)
        partner = matched if config.assignment == "optimal" else random_assignment(easy, generator)
        replaced = replace_mask(batch, partner, rho)
        if config.token_selection == "random":
            replaced = random_replace_mask(replaced, generator)
        weight = batch if config.relabel == "saliency" else torch.ones_like(batch)
        _, received = label_weights(weight, partner, replaced)
        sums = (
            replaced.any(dim=1).sum(),
            replaced.double().mean(dim=1).sum(),
            received.double().sum(),
            gain.gather(1, matched[:, None]).sum(),
            gain.mean(dim=1).sum(),
        )
        counts += torch.stack([value.double() for value in sums]).cpu()
    mixed, replaced_tokens, label_mass, matched_gain, random_gain = counts.tolist()
    num_images, num_tokens = sum(map(len, saliency)), saliency[0].shape[1]
    return HorizontalForecast(
        horizontal_rho_relative=rho * num_tokens,
        horizontal_rho=rho,
        images_mixed=mixed / num_images,
        tokens_replaced=replaced_tokens / max(mixed, 1),
        label_mass=label_mass / max(mixed, 1),
        matched_gain=matched_gain / num_images,
        random_gain=random_gain / num_images,
    )


def collected_attention(
    layer: TokenMixupLayerMixin,
    hidden: torch.Tensor,
    collected: torch.Tensor,
    positions: torch.Tensor,
    kappas: Sequence[int],
    layer_kwargs: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """Attention of a layer to tokens of earlier layers, over its own tokens and kappa tokens of each earlier layer.

    Args:
        layer: The layer.
        hidden: (B, N, D) input of the layer.
        collected: (B, L, K, D) input tokens of L earlier layers by decreasing saliency, without normalization.
        positions: (B, L, K) patch slots from which these tokens come.
        kappas: Values of kappa, each up to K.
        layer_kwargs: Arguments of the layer that its attention depends on.

    Returns:
        (B, len(kappas)) attention to the first kappa tokens of each earlier layer, mean over queries and heads.
    """
    _, num_layers, num_collected, _ = collected.shape
    num_tokens = hidden.shape[1]
    last = torch.tensor(kappas, device=hidden.device) - 1
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        kwargs = layer.add_memory_positions(layer_kwargs or {}, lambda: positions.flatten(1))
        query, key, scale, bias = layer.compute_query_key(
            hidden, cls_query_only=False, memory=collected.flatten(1, 2), **kwargs
        )
        scores = upcast_to_float32(query) * scale @ upcast_to_float32(key).transpose(2, 3)  # (B, H, N, N + L * K)
        if bias is not None:
            scores = scores + bias
        weight = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        own = weight[..., :num_tokens].sum(dim=-1, keepdim=True)
        memory = weight[..., num_tokens:].unflatten(-1, (num_layers, num_collected)).sum(dim=-2).cumsum(dim=-1)
        memory = memory[..., last]
        return (memory / (own + memory)).mean(dim=(1, 2))
