"""TokenMixup for BEiT of transformers."""

from typing import Any

import torch
from transformers import BeitConfig, BeitForImageClassification
from transformers.models.beit.modeling_beit import BeitAttention, BeitLayer

from ..configuration import TokenMixupConfigMixin
from ..network import Network
from .attention import VerticalAttentionMixin, extend_bias
from .modeling_tokenmixup import TokenMixupModelMixin
from .vit_parts import ViTLayerMixin, describe_vit_network


class TokenMixupBeitConfig(TokenMixupConfigMixin, BeitConfig):
    """`BeitConfig` with the settings of TokenMixup.

    Args:
        kwargs: attributes of `hf_tokenmixup.configuration.TokenMixupConfigMixin` and of `BeitConfig`.

    Raises:
        ValueError: if a setting is out of range or does not fit the model.
    """

    display_name = "BEiT"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_tokenmixup_config()

    @property
    def network(self) -> Network:
        """Sizes of the network. The classifier reads the mean of the patch tokens, or the CLS token."""
        pooling = "mean" if self.use_mean_pooling else "cls"
        return describe_vit_network(self, num_prefix_tokens=1, classifier_pooling=pooling)


class VerticalBeitAttention(VerticalAttentionMixin, BeitAttention):
    """Self-attention with a memory of salient tokens. The relative position bias of the memory is 0."""


class TokenMixupBeitLayer(ViTLayerMixin, BeitLayer):
    """BEiT layer with TokenMixup: mixes its input (HTM) and attends to salient tokens of earlier layers (VTM)."""

    vertical_attention_class = VerticalBeitAttention

    def attention_bias(
        self,
        attention_mask: torch.Tensor | None = None,
        resolution: tuple[int, int] | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """Compute the relative position bias.

        Args:
            attention_mask: bias that all layers share; None: no shared bias.
            resolution: height and width of the images in pixels.
            interpolate_pos_encoding: as in the base layer.
            kwargs: other arguments of the layer.

        Returns:
            (1, H, N, N), the sum of the shared bias and that of this layer; None: no bias.
        """
        shared = extend_bias(attention_mask, 0)
        if self.relative_position_bias is None:
            return shared
        rows, columns = (side // self.patch_size for side in resolution)
        bias = self.relative_position_bias((rows, columns), interpolate_pos_encoding, dim_size=rows * columns + 1)
        return bias if shared is None else bias + shared

    def forward_with_attention(self, hidden: torch.Tensor, attention: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """See `hf_tokenmixup.saliency.SupportsAttentionSaliency`."""
        hidden = hidden + self.lambda_1 * self.attend(hidden, attention)
        return hidden + self.lambda_2 * self.mlp(self.layernorm_after(hidden))


class TokenMixupBeitForImageClassification(TokenMixupModelMixin, BeitForImageClassification):
    """`BeitForImageClassification` with TokenMixup in training mode. In evaluation mode it is the base model.

    Raises:
        ValueError: if the configuration has no settings of TokenMixup, or invalid ones.
    """

    config_class = TokenMixupBeitConfig
    base_model_class = BeitForImageClassification
    layer_class = TokenMixupBeitLayer
    lora_target_modules = ("q_proj", "v_proj")
    # Checkpoints of pretraining have it.
    unused_parameters = (".mask_token",)


MODEL_TYPES = {"beit": (TokenMixupBeitConfig, TokenMixupBeitForImageClassification)}
