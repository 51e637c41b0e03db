"""TokenMixup for the Compact Transformers (paper: section 4, CCT-7/3x1 on CIFAR)."""

import torch
from torch.nn import functional as F

from ...configuration import TokenMixupConfigMixin
from ...saliency import queries_of_inputs
from ..layers import TokenMixupLayerMixin, has_plain_weight
from ..modeling_tokenmixup import TokenMixupModelMixin
from .configuration_cct import CctConfig
from .modeling_cct import CctAttention, CctForImageClassification, CctLayer


class TokenMixupCctConfig(TokenMixupConfigMixin, CctConfig):
    """``CctConfig`` with the settings of TokenMixup as further attributes.

    Args:
        kwargs: settings of :class:`~hf_tokenmixup.configuration.TokenMixupConfigMixin` and of ``CctConfig``. As there
        is
            no CLS token by default, ScoreNet pools by attention and all tokens are asked for saliency.

    Raises:
        ValueError: for a setting out of its range or not fitting the network.
    """

    # A checkpoint in training is opened with this package, so it carries no code.
    _auto_class = None

    scorenet_pooling: str = "attention"
    saliency_query: str = "mean"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_tokenmixup_config()

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patch tokens of an image of this size."""
        return self.grid_size(height, width)


class VerticalCctAttention(CctAttention):
    """Attention whose keys and values also come from a memory of salient tokens, if one is given (Eq. (13))."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, N, D) normed tokens and (B, M, D) normed memory to (B, N, D) and the weights (B, H, N, N + M)."""
        if memory is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        query, key, value = self.query_key_value(torch.cat([hidden_states, memory], dim=1))
        return self.attend(query[:, :, : hidden_states.shape[1]], key, value, **kwargs)


class TokenMixupCctLayer(TokenMixupLayerMixin, CctLayer):
    """A CCT layer that mixes the tokens that enter it (HTM), hands tokens on to later layers and takes them (VTM).

    Args:
        config: with the settings of TokenMixup.
        layer_index: the layer's number, from 0.
    """

    def __init__(self, config: TokenMixupCctConfig, layer_index: int):
        super().__init__(config, layer_index)
        if layer_index in config.vertical_layers:
            self.attention = VerticalCctAttention(config)
        self.init_tokenmixup(config, layer_index)

    def query_and_key(self, hidden: torch.Tensor, cls_query_only: bool) -> tuple[torch.Tensor, torch.Tensor, float]:
        """See :class:`~hf_tokenmixup.saliency.SupportsAttentionSaliency`."""
        attention, normed = self.attention, self.normed(hidden)
        if not has_plain_weight(attention.qkv):
            query, key, _ = attention.query_key_value(normed)
            return query[:, :, :1] if cls_query_only else query, key, attention.scaling
        query_weight, key_weight, _ = attention.qkv.weight.chunk(3)
        if cls_query_only:
            query = attention.split_heads(F.linear(normed[:, :1], query_weight), 1)[0]
            return queries_of_inputs(query, key_weight), normed[:, None], attention.scaling
        query, key = attention.split_heads(F.linear(normed, attention.qkv.weight[: 2 * len(key_weight)]), 2)
        return query, key, attention.scaling

    def propagate(self, hidden: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """See :class:`~hf_tokenmixup.saliency.SupportsAttentionSaliency`."""
        _, _, value = self.attention.query_key_value(self.normed(hidden))
        attended = self.attention.proj((attention.to(value.dtype) @ value).transpose(1, 2).flatten(2))
        hidden = self.norm1(hidden + attended)
        return hidden + self.linear2(self.activation(self.linear1(hidden)))


class TokenMixupCctForImageClassification(TokenMixupModelMixin, CctForImageClassification):
    """``CctForImageClassification`` that mixes tokens in training, and is the plain model otherwise.

    Raises:
        ValueError: for a configuration without the settings of TokenMixup, or with invalid ones.
    """

    _auto_class = None
    config_class = TokenMixupCctConfig
    base_model_class = CctForImageClassification
    layer_class = TokenMixupCctLayer
    lora_target_modules = ("qkv",)
