"""TokenMixup for SigLIP, and for SigLIP 2 at a fixed image size, whose checkpoints have the same model type."""

from transformers import SiglipConfig, SiglipForImageClassification
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipEncoderLayer

from .vision_text import (
    VisionTextAttentionMixin,
    VisionTextConfigMixin,
    VisionTextLayerMixin,
    VisionTextModelMixin,
)


class TokenMixupSiglipConfig(VisionTextConfigMixin, SiglipConfig):
    """`SiglipConfig` with the settings of TokenMixup.

    Args:
        kwargs: attributes of `hf_tokenmixup.configuration.TokenMixupConfigMixin` and of `SiglipConfig`, and
            `image_size` of its `vision_config`.

    Raises:
        ValueError: if a setting is out of range or does not fit the model.
    """

    display_name = "SigLIP"
    num_vision_prefix_tokens = 0


class VerticalSiglipAttention(VisionTextAttentionMixin, SiglipAttention):
    """Self-attention with a memory of salient tokens."""


class TokenMixupSiglipEncoderLayer(VisionTextLayerMixin, SiglipEncoderLayer):
    """SigLIP layer with TokenMixup: mixes its input (HTM) and attends to salient tokens of earlier layers (VTM)."""

    vertical_attention_class = VerticalSiglipAttention


class TokenMixupSiglipForImageClassification(VisionTextModelMixin, SiglipForImageClassification):
    """`SiglipForImageClassification` with TokenMixup in training mode. In evaluation mode it is the base model.

    `from_pretrained` loads the image encoder of every `SiglipModel`, too: the weights for texts are not used.

    Raises:
        ValueError: if the configuration has no settings of TokenMixup, or invalid ones.
    """

    config_class = TokenMixupSiglipConfig
    base_model_class = SiglipForImageClassification
    layer_class = TokenMixupSiglipEncoderLayer
    # The classifier averages the tokens. The pooling head is for comparisons with texts.
    unused_parameters = ("vision_model.head.",)


MODEL_TYPES = {"siglip": (TokenMixupSiglipConfig, TokenMixupSiglipForImageClassification)}
