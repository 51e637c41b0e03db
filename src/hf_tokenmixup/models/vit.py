"""TokenMixup for the Vision Transformer of transformers (paper: section 4, ViT-B/16 on ImageNet-1k).

The layers of transformers' `ViTModel` are converted. The class of the model itself stays, since transformers renames
checkpoint keys by model class.
"""

from typing import Any

from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer

from ..configuration import TokenMixupConfigMixin
from ..network import Network
from .attention import VerticalAttentionMixin
from .modeling_tokenmixup import TokenMixupModelMixin
from .vit_parts import ViTLayerMixin, describe_vit_network

# Model type of masked autoencoders, and beginnings of the names of their other attributes.
_AUTOENCODER = "vit_mae"
_OF_AUTOENCODER = ("decoder_", "mask_ratio", "norm_pix_loss")


class TokenMixupViTConfig(TokenMixupConfigMixin, ViTConfig):
    """`ViTConfig` with the settings of TokenMixup.

    The model type is `"vit"`: every ViT checkpoint can be loaded, and exported models load as a standard ViT. The
    encoder of a masked autoencoder (`"vit_mae"`) loads as a ViT, too.

    Args:
        kwargs: attributes of `hf_tokenmixup.configuration.TokenMixupConfigMixin` and of `ViTConfig`.

    Raises:
        ValueError: if a setting is out of range or does not fit the model.
    """

    display_name = "ViT"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_tokenmixup_config()

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Load attributes as in `PreTrainedConfig.get_config_dict`, without those of the decoder of an autoencoder."""
        config_dict, unused = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") == _AUTOENCODER:
            config_dict = {name: value for name, value in config_dict.items() if not name.startswith(_OF_AUTOENCODER)}
            config_dict["model_type"] = cls.model_type
        return config_dict, unused

    @property
    def network(self) -> Network:
        """Sizes of the network. The classifier reads the CLS token."""
        return describe_vit_network(self, num_prefix_tokens=1, classifier_pooling="cls")


class VerticalViTAttention(VerticalAttentionMixin, ViTAttention):
    """Self-attention with a memory of salient tokens."""


class TokenMixupViTLayer(ViTLayerMixin, ViTLayer):
    """ViT layer with TokenMixup: mixes its input (HTM) and attends to salient tokens of earlier layers (VTM)."""

    vertical_attention_class = VerticalViTAttention


class TokenMixupViTForImageClassification(TokenMixupModelMixin, ViTForImageClassification):
    """`ViTForImageClassification` with TokenMixup in training mode. In evaluation mode it is the base model.

    `from_pretrained` loads every ViT checkpoint. Settings of TokenMixup are keyword arguments:
    `from_pretrained("google/vit-base-patch16-224", horizontal_layers=[3], vertical_layers=[4])`.

    Raises:
        ValueError: if the configuration has no settings of TokenMixup, or invalid ones.
    """

    config_class = TokenMixupViTConfig
    base_model_class = ViTForImageClassification
    layer_class = TokenMixupViTLayer
    lora_target_modules = ("q_proj", "v_proj")


MODEL_TYPES = dict.fromkeys(("vit", _AUTOENCODER), (TokenMixupViTConfig, TokenMixupViTForImageClassification))
