"""TokenMixup for DeiT of transformers."""

from transformers import DeiTConfig, DeiTForImageClassification
from transformers.models.deit.modeling_deit import DeiTAttention, DeiTLayer

from ..configuration import TokenMixupConfigMixin
from ..network import Network
from .attention import VerticalAttentionMixin
from .modeling_tokenmixup import TokenMixupModelMixin
from .vit_parts import ViTLayerMixin, describe_vit_network


class TokenMixupDeiTConfig(TokenMixupConfigMixin, DeiTConfig):
    """`DeiTConfig` with the settings of TokenMixup.

    Args:
        kwargs: attributes of `hf_tokenmixup.configuration.TokenMixupConfigMixin` and of `DeiTConfig`.

    Raises:
        ValueError: if a setting is out of range or does not fit the model.
    """

    display_name = "DeiT"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_tokenmixup_config()

    @property
    def network(self) -> Network:
        """Sizes of the network. The prefix is the CLS token, which is classified, and the distillation token."""
        return describe_vit_network(self, num_prefix_tokens=2, classifier_pooling="cls")


class VerticalDeiTAttention(VerticalAttentionMixin, DeiTAttention):
    """Self-attention with a memory of salient tokens."""


class TokenMixupDeiTLayer(ViTLayerMixin, DeiTLayer):
    """DeiT layer with TokenMixup: mixes its input (HTM) and attends to salient tokens of earlier layers (VTM)."""

    vertical_attention_class = VerticalDeiTAttention


class TokenMixupDeiTForImageClassification(TokenMixupModelMixin, DeiTForImageClassification):
    """`DeiTForImageClassification` with TokenMixup in training mode. In evaluation mode it is the base model.

    A checkpoint of `DeiTForImageClassificationWithTeacher` loads with a new classifier, as in the base model.

    Raises:
        ValueError: if the configuration has no settings of TokenMixup, or invalid ones.
    """

    config_class = TokenMixupDeiTConfig
    base_model_class = DeiTForImageClassification
    layer_class = TokenMixupDeiTLayer
    lora_target_modules = ("q_proj", "v_proj")


MODEL_TYPES = {"deit": (TokenMixupDeiTConfig, TokenMixupDeiTForImageClassification)}
