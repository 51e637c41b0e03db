"""TokenMixup for CLIP and MetaCLIP 2."""

from torch import nn
from transformers import CLIPConfig, CLIPForImageClassification, MetaClip2Config, MetaClip2ForImageClassification
from transformers import initialization as init
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer
from transformers.models.metaclip_2.modeling_metaclip_2 import MetaClip2Attention, MetaClip2EncoderLayer

from ..horizontal import ScoreNet
from .vision_text import (
    VisionTextAttentionMixin,
    VisionTextConfigMixin,
    VisionTextLayerMixin,
    VisionTextModelMixin,
)


class TokenMixupCLIPConfig(VisionTextConfigMixin, CLIPConfig):
    """`CLIPConfig` with the settings of TokenMixup.

    Args:
        kwargs: attributes of `hf_tokenmixup.configuration.TokenMixupConfigMixin` and of `CLIPConfig`, and `image_size`
            of its `vision_config`.

    Raises:
        ValueError: if a setting is out of range or does not fit the model.
    """

    display_name = "CLIP"
    num_vision_prefix_tokens = 1


class TokenMixupMetaClip2Config(VisionTextConfigMixin, MetaClip2Config):
    """`MetaClip2Config` with the settings of TokenMixup.

    Args:
        kwargs: attributes of `hf_tokenmixup.configuration.TokenMixupConfigMixin` and of `MetaClip2Config`, and
            `image_size` of its `vision_config`.

    Raises:
        ValueError: if a setting is out of range or does not fit the model.
    """

    display_name = "MetaCLIP 2"
    num_vision_prefix_tokens = 1


class VerticalCLIPAttention(VisionTextAttentionMixin, CLIPAttention):
    """Self-attention with a memory of salient tokens."""


class VerticalMetaClip2Attention(VisionTextAttentionMixin, MetaClip2Attention):
    """Self-attention with a memory of salient tokens."""


class TokenMixupCLIPEncoderLayer(VisionTextLayerMixin, CLIPEncoderLayer):
    """CLIP layer with TokenMixup: mixes its input (HTM) and attends to salient tokens of earlier layers (VTM)."""

    vertical_attention_class = VerticalCLIPAttention


class TokenMixupMetaClip2EncoderLayer(VisionTextLayerMixin, MetaClip2EncoderLayer):
    """As `TokenMixupCLIPEncoderLayer`, for MetaCLIP 2."""

    vertical_attention_class = VerticalMetaClip2Attention


class _CLIPModelMixin(VisionTextModelMixin):
    # The classifier averages the patch tokens. The normalized CLS token is for comparisons with texts.
    unused_parameters = ("vision_model.post_layernorm.",)
    min_transformers_version = "5.13"

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ScoreNet):
            # As the classifier. CLIP initializes other linear layers that are not its own with a deviation of 1.
            std = self.config.vision_config.hidden_size**-0.5 * self.config.initializer_factor
            for layer in module.children():
                init.normal_(layer.weight, std=std)
                init.zeros_(layer.bias)


class TokenMixupCLIPForImageClassification(_CLIPModelMixin, CLIPForImageClassification):
    """`CLIPForImageClassification` with TokenMixup in training mode. In evaluation mode it is the base model.

    `from_pretrained` loads the image encoder of every `CLIPModel`, too: the weights for texts are not used.

    Raises:
        ValueError: if the configuration has no settings of TokenMixup, or invalid ones.
    """

    config_class = TokenMixupCLIPConfig
    base_model_class = CLIPForImageClassification
    layer_class = TokenMixupCLIPEncoderLayer


class TokenMixupMetaClip2ForImageClassification(_CLIPModelMixin, MetaClip2ForImageClassification):
    """As `TokenMixupCLIPForImageClassification`, for MetaCLIP 2.

    Raises:
        ValueError: if the configuration has no settings of TokenMixup, or invalid ones.
    """

    config_class = TokenMixupMetaClip2Config
    base_model_class = MetaClip2ForImageClassification
    layer_class = TokenMixupMetaClip2EncoderLayer


MODEL_TYPES = {
    "clip": (TokenMixupCLIPConfig, TokenMixupCLIPForImageClassification),
    "metaclip_2": (TokenMixupMetaClip2Config, TokenMixupMetaClip2ForImageClassification),
}
