"""Parts shared by the families that transformers builds as its ViT."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..network import Network
from .attention import SeparateProjectionsMixin
from .cct.configuration_cct import height_and_width


class ViTLayerMixin(SeparateProjectionsMixin):
    """Layer with the parts of `ViTLayer`. Precedes the base layer among the base classes."""

    @property
    def pre_norm(self) -> nn.LayerNorm:
        """The normalization before attention."""
        return self.layernorm_before

    def forward_with_attention(self, hidden: torch.Tensor, attention: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """See `hf_tokenmixup.saliency.SupportsAttentionSaliency`."""
        hidden = hidden + self.attend(hidden, attention)
        return hidden + self.mlp(self.layernorm_after(hidden))


def describe_vit_network(config: PreTrainedConfig, *, num_prefix_tokens: int, classifier_pooling: str) -> Network:
    """Describe a network whose configuration has the attributes of `ViTConfig`.

    Args:
        config: configuration of the model.
        num_prefix_tokens: P, the number of leading tokens that are not patch tokens.
        classifier_pooling: what the classifier reads, see `hf_tokenmixup.network.Network`.
    """
    return Network(
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_size=config.intermediate_size,
        image_size=height_and_width(config.image_size),
        patch_size=height_and_width(config.patch_size),
        num_prefix_tokens=num_prefix_tokens,
        classifier_pooling=classifier_pooling,
    )
