"""Models with random weights and the TokenMixup settings of the paper, for benchmarks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..models import (
    TokenMixupCctConfig,
    TokenMixupCctForImageClassification,
    TokenMixupModelMixin,
    TokenMixupViTConfig,
    TokenMixupViTForImageClassification,
)


@dataclass(frozen=True)
class ModelPreset:
    """A model size.

    Attributes:
        name: Name in tables.
        build: Builds the model from keyword arguments of its configuration; TokenMixup is off by default.
        batch_size: Default batch size.
        tokenmixup_configs: TokenMixup settings for `HTM`, `VTM` and `HTM + VTM`.
    """

    name: str
    build: Callable[..., TokenMixupModelMixin]
    batch_size: int
    tokenmixup_configs: dict[str, dict[str, Any]]


def _vit(hidden_size: int, num_attention_heads: int, **settings: Any) -> TokenMixupModelMixin:
    widths = {"hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "layer_norm_eps": 1e-6}
    config = TokenMixupViTConfig(**widths, num_attention_heads=num_attention_heads, **settings)
    return TokenMixupViTForImageClassification(config)


def _cct(size: str, **settings: Any) -> TokenMixupModelMixin:
    return TokenMixupCctForImageClassification(getattr(TokenMixupCctConfig, size)(**settings))


_VIT_CONFIGS = {
    "HTM": {"horizontal_layers": [3]},
    "VTM": {"vertical_layers": [3]},
    "HTM + VTM": {"horizontal_layers": [3], "vertical_layers": [4]},
}
_SCORENET = {"scorenet_detach": False, "scorenet_loss_weight": 0.001}
# HTM and VTM as for CIFAR-10, both together as for CIFAR-100.
_CCT_7_CONFIGS = {
    "HTM": {"horizontal_layers": [2], **_SCORENET},
    "VTM": {"vertical_layers": [1], "vertical_kappa": 5},
    "HTM + VTM": {"horizontal_layers": [3], "vertical_layers": [2], **_SCORENET},
}
_CCT_2_CONFIGS = {
    "HTM": {"horizontal_layers": [1], **_SCORENET},
    "VTM": {"vertical_layers": [1]},
    "HTM + VTM": {"horizontal_layers": [1], "vertical_layers": [1], **_SCORENET},
}
MODEL_PRESETS = {
    "vit-tiny": ModelPreset("ViT-Ti/16", partial(_vit, 192, 3, num_labels=1000), 16, _VIT_CONFIGS),
    "vit-small": ModelPreset("ViT-S/16", partial(_vit, 384, 6, num_labels=1000), 16, _VIT_CONFIGS),
    "vit-base": ModelPreset("ViT-B/16", partial(_vit, 768, 12, num_labels=1000), 16, _VIT_CONFIGS),
    "cct-7-3x1": ModelPreset("CCT-7/3x1", partial(_cct, "cct_7_3x1", num_labels=100), 64, _CCT_7_CONFIGS),
    "cct-2-3x2": ModelPreset("CCT-2/3x2", partial(_cct, "cct_2_3x2", num_labels=10), 64, _CCT_2_CONFIGS),
}
