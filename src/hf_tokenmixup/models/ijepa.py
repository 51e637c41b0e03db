"""TokenMixup for I-JEPA of transformers."""

from transformers import IJepaConfig, IJepaForImageClassification
from transformers.models.ijepa.modeling_ijepa import IJepaAttention, IJepaLayer

from ..configuration import TokenMixupConfigMixin
from ..network import Network
from .attention import VerticalAttentionMixin
from .modeling_tokenmixup import TokenMixupModelMixin
from .vit_parts import ViTLayerMixin, describe_vit_network


class TokenMixupIJepaConfig(TokenMixupConfigMixin, IJepaConfig):
    """`IJepaConfig` with the settings of TokenMixup.

    Args:
        kwargs: attributes of `hf_tokenmixup.configuration.TokenMixupConfigMixin` and of `IJepaConfig`.

    Raises:
        ValueError: if a setting is out of range or does not fit the model.
    """

    display_name = "I-JEPA"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_tokenmixup_config()

    @property
    def network(self) -> Network:
        """Sizes of the network. There is no CLS token: the classifier reads the mean of the tokens."""
        return describe_vit_network(self, num_prefix_tokens=0, classifier_pooling="mean")


class VerticalIJepaAttention(VerticalAttentionMixin, IJepaAttention):
    """Self-attention with a memory of salient tokens."""


class TokenMixupIJepaLayer(ViTLayerMixin, IJepaLayer):
    """I-JEPA layer with TokenMixup: mixes its input (HTM) and attends to salient tokens of earlier layers (VTM)."""

    vertical_attention_class = VerticalIJepaAttention


class TokenMixupIJepaForImageClassification(TokenMixupModelMixin, IJepaForImageClassification):
    """`IJepaForImageClassification` with TokenMixup in training mode. In evaluation mode it is the base model.

    Raises:
        ValueError: if the configuration has no settings of TokenMixup, or invalid ones.
    """

    config_class = TokenMixupIJepaConfig
    base_model_class = IJepaForImageClassification
    layer_class = TokenMixupIJepaLayer
    lora_target_modules = ("q_proj", "v_proj")


MODEL_TYPES = {"ijepa": (TokenMixupIJepaConfig, TokenMixupIJepaForImageClassification)}
