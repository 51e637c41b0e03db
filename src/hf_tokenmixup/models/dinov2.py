"""TokenMixup for DINOv2 of transformers, without and with register tokens."""

from typing import Any

import torch
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
)
from transformers.models.dinov2.modeling_dinov2 import Dinov2Attention, Dinov2Layer
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersAttention,
    Dinov2WithRegistersLayer,
)

from ..configuration import TokenMixupConfigMixin
from ..network import Network
from .attention import SeparateProjectionsMixin, VerticalAttentionMixin
from .cct.configuration_cct import height_and_width
from .modeling_tokenmixup import TokenMixupModelMixin


def _describe_network(config: Dinov2Config | Dinov2WithRegistersConfig, num_register_tokens: int) -> Network:
    mlp_size = int(config.hidden_size * config.mlp_ratio)
    if config.use_swiglu_ffn:
        mlp_size = (int(mlp_size * 2 / 3) + 7) // 8 * 8
    return Network(
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_size=mlp_size,
        image_size=height_and_width(config.image_size),
        patch_size=height_and_width(config.patch_size),
        num_prefix_tokens=1 + num_register_tokens,
        classifier_pooling="cls_mean",
    )


class TokenMixupDinov2Config(TokenMixupConfigMixin, Dinov2Config):
    """`Dinov2Config` with the settings of TokenMixup.

    Args:
        kwargs: attributes of `hf_tokenmixup.configuration.TokenMixupConfigMixin` and of `Dinov2Config`.

    Raises:
        ValueError: if a setting is out of range or does not fit the model.
    """

    display_name = "DINOv2"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_tokenmixup_config()

    @property
    def network(self) -> Network:
        """Sizes of the network. The classifier reads the CLS token and the mean of the patch tokens."""
        return _describe_network(self, num_register_tokens=0)


class TokenMixupDinov2WithRegistersConfig(TokenMixupConfigMixin, Dinov2WithRegistersConfig):
    """`Dinov2WithRegistersConfig` with the settings of TokenMixup.

    Args:
        kwargs: attributes of `hf_tokenmixup.configuration.TokenMixupConfigMixin` and of `Dinov2WithRegistersConfig`.

    Raises:
        ValueError: if a setting is out of range or does not fit the model.
    """

    display_name = "DINOv2 with registers"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_tokenmixup_config()

    @property
    def network(self) -> Network:
        """Sizes of the network. The prefix is the CLS token and the register tokens."""
        return _describe_network(self, self.num_register_tokens)


class VerticalDinov2Attention(VerticalAttentionMixin, Dinov2Attention):
    """Self-attention with a memory of salient tokens."""


class VerticalDinov2WithRegistersAttention(VerticalAttentionMixin, Dinov2WithRegistersAttention):
    """Self-attention with a memory of salient tokens."""


class _Dinov2LayerMixin(SeparateProjectionsMixin):
    @property
    def pre_norm(self) -> nn.LayerNorm:
        """The normalization before attention."""
        return self.norm1

    def forward_with_attention(self, hidden: torch.Tensor, attention: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """See `hf_tokenmixup.saliency.SupportsAttentionSaliency`."""
        hidden = hidden + self.layer_scale1(self.attend(hidden, attention))
        return hidden + self.layer_scale2(self.mlp(self.norm2(hidden)))


class TokenMixupDinov2Layer(_Dinov2LayerMixin, Dinov2Layer):
    """DINOv2 layer with TokenMixup: mixes its input (HTM) and attends to salient tokens of earlier layers (VTM)."""

    vertical_attention_class = VerticalDinov2Attention


class TokenMixupDinov2WithRegistersLayer(_Dinov2LayerMixin, Dinov2WithRegistersLayer):
    """As `TokenMixupDinov2Layer`, for DINOv2 with register tokens."""

    vertical_attention_class = VerticalDinov2WithRegistersAttention


class _Dinov2ModelMixin(TokenMixupModelMixin):
    lora_target_modules = ("q_proj", "v_proj")
    unused_parameters = (".mask_token",)
    # Positions are always interpolated to the size of the images.
    takes_interpolate_pos_encoding = False
    min_transformers_version = "5.18"

    def get_transformer_layers(self) -> nn.ModuleList:
        """Return the transformer layers."""
        return self.base_model.encoder.layer


class TokenMixupDinov2ForImageClassification(_Dinov2ModelMixin, Dinov2ForImageClassification):
    """`Dinov2ForImageClassification` with TokenMixup in training mode. In evaluation mode it is the base model.

    Raises:
        ValueError: if the configuration has no settings of TokenMixup, or invalid ones.
    """

    config_class = TokenMixupDinov2Config
    base_model_class = Dinov2ForImageClassification
    layer_class = TokenMixupDinov2Layer


class TokenMixupDinov2WithRegistersForImageClassification(
    _Dinov2ModelMixin, Dinov2WithRegistersForImageClassification
):
    """As `TokenMixupDinov2ForImageClassification`, for DINOv2 with register tokens.

    Raises:
        ValueError: if the configuration has no settings of TokenMixup, or invalid ones.
    """

    config_class = TokenMixupDinov2WithRegistersConfig
    base_model_class = Dinov2WithRegistersForImageClassification
    layer_class = TokenMixupDinov2WithRegistersLayer


MODEL_TYPES = {
    "dinov2": (TokenMixupDinov2Config, TokenMixupDinov2ForImageClassification),
    "dinov2_with_registers": (
        TokenMixupDinov2WithRegistersConfig,
        TokenMixupDinov2WithRegistersForImageClassification,
    ),
}
