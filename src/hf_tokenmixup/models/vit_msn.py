"""TokenMixup for ViT-MSN of transformers."""

from transformers import ViTMSNConfig, ViTMSNForImageClassification
from transformers.models.vit_msn.modeling_vit_msn import ViTMSNAttention, ViTMSNLayer

from ..configuration import TokenMixupConfigMixin
from ..network import Network
from .attention import VerticalAttentionMixin
from .modeling_tokenmixup import TokenMixupModelMixin
from .vit_parts import ViTLayerMixin, describe_vit_network


class TokenMixupViTMSNConfig(TokenMixupConfigMixin, ViTMSNConfig):
    """`ViTMSNConfig` with the settings of TokenMixup.

    Args:
        kwargs: attributes of `hf_tokenmixup.configuration.TokenMixupConfigMixin` and of `ViTMSNConfig`.

    Raises:
        ValueError: if a setting is out of range or does not fit the model.
    """

    display_name = "ViT-MSN"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_tokenmixup_config()

    @property
    def network(self) -> Network:
        """Sizes of the network. The classifier reads the CLS token."""
        return describe_vit_network(self, num_prefix_tokens=1, classifier_pooling="cls")


class VerticalViTMSNAttention(VerticalAttentionMixin, ViTMSNAttention):
    """Self-attention with a memory of salient tokens."""


class TokenMixupViTMSNLayer(ViTLayerMixin, ViTMSNLayer):
    """ViT-MSN layer with TokenMixup: mixes its input (HTM) and attends to salient tokens of earlier layers (VTM)."""

    vertical_attention_class = VerticalViTMSNAttention


class TokenMixupViTMSNForImageClassification(TokenMixupModelMixin, ViTMSNForImageClassification):
    """`ViTMSNForImageClassification` with TokenMixup in training mode. In evaluation mode it is the base model.

    Raises:
        ValueError: if the configuration has no settings of TokenMixup, or invalid ones.
    """

    config_class = TokenMixupViTMSNConfig
    base_model_class = ViTMSNForImageClassification
    layer_class = TokenMixupViTMSNLayer
    lora_target_modules = ("q_proj", "v_proj")
    # Older versions rename the weights of a checkpoint for the plain class only.
    min_transformers_version = "5.18"


MODEL_TYPES = {"vit_msn": (TokenMixupViTMSNConfig, TokenMixupViTMSNForImageClassification)}
