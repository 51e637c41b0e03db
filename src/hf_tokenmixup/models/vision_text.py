"""TokenMixup for the image encoder of models of images and texts, such as CLIP. Its sizes are in `vision_config`."""

from typing import Any, ClassVar

import torch
from torch import nn

from ..configuration import TokenMixupConfigMixin
from ..network import Network
from .attention import SeparateProjectionsMixin, VerticalAttentionMixin
from .cct.configuration_cct import height_and_width
from .modeling_tokenmixup import TokenMixupModelMixin


class VisionTextConfigMixin(TokenMixupConfigMixin):
    """Settings of TokenMixup for a configuration with a `vision_config`. Precedes the base configuration.

    Its classifier reads the mean of the patch tokens.
    """

    num_vision_prefix_tokens: ClassVar[int]

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_tokenmixup_config()

    @property
    def network(self) -> Network:
        """Sizes of the image encoder. The classifier reads the mean of the patch tokens."""
        vision = self.vision_config
        return Network(
            hidden_size=vision.hidden_size,
            num_layers=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            mlp_size=vision.intermediate_size,
            image_size=height_and_width(vision.image_size),
            patch_size=height_and_width(vision.patch_size),
            num_prefix_tokens=self.num_vision_prefix_tokens,
            classifier_pooling="mean",
        )

    @property
    def image_size(self) -> int:
        """Side of the images in pixels, an attribute of `vision_config`."""
        return self.vision_config.image_size

    @image_size.setter
    def image_size(self, size: int | list[int]) -> None:
        height, width = height_and_width(size)
        self.vision_config.image_size = height if height == width else size

    def validate_tokenmixup_config(self) -> None:
        """Validate all settings.

        Raises:
            ValueError: if images are not square, or a setting is out of range or does not fit the model.
        """
        if not isinstance(self.image_size, int):
            raise ValueError(
                f"image_size must be one number for the model type {self.model_type}, whose learned positions form a "
                f"square, got {self.image_size}. Pass the side of square images."
            )
        super().validate_tokenmixup_config()


class VisionTextAttentionMixin(VerticalAttentionMixin):
    """Self-attention with a memory of salient tokens. Precedes the attention of the base model."""

    out_proj_name = "out_proj"
    scaling_name = "scale"
    dropout_name = "dropout"


class VisionTextLayerMixin(SeparateProjectionsMixin):
    """Layer of an image encoder with TokenMixup. Precedes the base layer among the base classes."""

    @property
    def attention_module(self) -> nn.Module:
        """The self-attention of the layer."""
        return self.self_attn

    @property
    def pre_norm(self) -> nn.LayerNorm:
        """The normalization before attention."""
        return self.layer_norm1

    def forward_with_attention(self, hidden: torch.Tensor, attention: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """See `hf_tokenmixup.saliency.SupportsAttentionSaliency`."""
        hidden = hidden + self.attend(hidden, attention)
        return hidden + self.mlp(self.layer_norm2(hidden))


class VisionTextModelMixin(TokenMixupModelMixin):
    """Classifier with an image encoder `vision_model`. Precedes the base classifier among the base classes."""

    lora_target_modules = ("q_proj", "v_proj")

    def get_transformer_layers(self) -> nn.ModuleList:
        """Return the transformer layers."""
        return self.vision_model.encoder.layers
