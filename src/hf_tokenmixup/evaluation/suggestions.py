"""Suggestion of settings from measurements of the layers of a model."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .forecasts import HorizontalForecast, LayerCalibration, VerticalForecast

TARGET_REPLACED_TOKENS = 0.2
REPLACED_TOKENS_RANGE = (0.05, 0.5)
MIN_MIXED_IMAGES = 0.5
TARGET_EASY_IMAGES = 0.5
MAX_FITTED_TAU = 0.43  # the paper's tau for CIFAR-10 and CIFAR-100, as a fraction of ln C
MIN_ATTENTION_MASS = 0.03


@dataclass(frozen=True)
class SuggestedSettings:
    """Settings that `suggest_settings` chooses.

    Attributes:
        horizontal_layer: Layer to mix before.
        horizontal_rho_relative: rho as a multiple of 1 / T; None if no value is suitable.
        horizontal_tau_relative: tau as a fraction of ln C.
        vertical_layer: Layer that attends to the tokens of earlier layers; None if only layer 0 was measured.
        vertical_kappa: Number of tokens of each earlier layer; None without `vertical_layer`.
    """

    horizontal_layer: int
    horizontal_rho_relative: float | None
    horizontal_tau_relative: float
    vertical_layer: int | None
    vertical_kappa: int | None

    def to_settings(self) -> dict[str, Any]:
        """Return the settings as attributes of a model configuration, without those that are None."""
        settings = asdict(self)
        horizontal, vertical = settings.pop("horizontal_layer"), settings.pop("vertical_layer")
        settings = {"horizontal_layers": [horizontal], "vertical_layers": None if vertical is None else [vertical]} | (
            settings
        )
        return {name: value for name, value in settings.items() if value is not None}


def suggest_settings(layers: Sequence[LayerCalibration], num_layers: int) -> SuggestedSettings:
    """Choose settings from measurements by simple rules.

    - Horizontal layer: of the measured layers 1 to num_layers / 2, the one with the highest ratio of the saliency's
      standard deviation to its mean. rho compares saliency values, so a layer with nearly uniform attention replaces
      arbitrary tokens. Layer 0 has no context yet: its CLS token is the same for all images, so ScoreNet cannot judge
      them. Later layers leave few layers that learn from mixed images; the paper mixes before layers 2 and 3. If none
      of these layers was measured, all measured layers count.
    - rho: the value that replaces closest to 20% of the tokens of mixed images. Values that mix fewer than half of the
      images, or replace fewer than 5% or more than 50% of their tokens, do not count. There may be none, as in a model
      with new weights, whose attention is nearly uniform.
    - tau: the value at which closest to half of the images are easy, so that HTM mixes images that the model has
      learned, and the others stay as they are. A fitted ScoreNet has seen few images, and one in training reaches a
      lower loss: what is half of the images here would soon be nearly all. A value from a fitted ScoreNet is therefore
      limited to 0.43, the paper's for CIFAR-10 and CIFAR-100. Fewer images are easy at first, and more after a while.
      The same limit applies if no image is easy at any value.
    - Vertical layer: the next measured layer after the horizontal layer; if there is none, the last measured layer.
    - kappa: the lowest value with an attention mass of at least 3%, since less would hardly change the layer's output.

    Args:
        layers: At least one layer.
        num_layers: Number of layers of the model.
    """
    early = [layer for layer in layers if 1 <= layer.layer <= num_layers // 2]
    horizontal = max(early or layers, key=lambda layer: layer.saliency_std / max(layer.saliency_mean, 1e-12))
    vertical_layers = [layer for layer in layers if layer.kappa]
    later = [layer for layer in vertical_layers if layer.layer > horizontal.layer]
    vertical = (later[:1] or vertical_layers[-1:] or [None])[0]
    return SuggestedSettings(
        horizontal_layer=horizontal.layer,
        horizontal_rho_relative=_suggest_rho(horizontal.rho),
        horizontal_tau_relative=_suggest_tau(horizontal),
        vertical_layer=None if vertical is None else vertical.layer,
        vertical_kappa=None if vertical is None else _suggest_kappa(vertical.kappa),
    )


def _suggest_rho(forecasts: Sequence[HorizontalForecast]) -> float | None:
    low, high = REPLACED_TOKENS_RANGE
    suitable = [
        forecast
        for forecast in forecasts
        if forecast.images_mixed >= MIN_MIXED_IMAGES and low <= forecast.tokens_replaced <= high
    ]
    if not suitable:
        return None
    best = min(suitable, key=lambda forecast: abs(forecast.tokens_replaced - TARGET_REPLACED_TOKENS))
    return best.horizontal_rho_relative


def _suggest_tau(layer: LayerCalibration) -> float:
    # Of equal distances, the highest value: it makes images easy the earliest.
    best = min(layer.tau, key=lambda item: (abs(item.easy_images - TARGET_EASY_IMAGES), -item.horizontal_tau_relative))
    limit = math.inf if layer.scorenet == "trained" and best.easy_images > 0 else MAX_FITTED_TAU
    return min(best.horizontal_tau_relative, limit)


def _suggest_kappa(forecasts: Sequence[VerticalForecast]) -> int:
    enough = [forecast for forecast in forecasts if forecast.attention_mass >= MIN_ATTENTION_MASS]
    return (enough or forecasts[-1:])[0].vertical_kappa
