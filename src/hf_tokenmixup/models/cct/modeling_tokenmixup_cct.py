"""TokenMixup for the Compact Transformers (paper: section 4, CCT-7/3x1 on CIFAR)."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import eager_attention_forward

from ...configuration import TokenMixupConfigMixin
from ...network import Network
from ...saliency import QueryKey, project_queries_to_inputs
from ..layers import TokenMixupLayerMixin, has_plain_weight
from ..modeling_tokenmixup import TokenMixupModelMixin
from .configuration_cct import CctConfig, height_and_width
from .modeling_cct import CctAttention, CctForImageClassification, CctLayer


class TokenMixupCctConfig(TokenMixupConfigMixin, CctConfig):
    """`CctConfig` with the settings of TokenMixup.

    Args:
        kwargs: attributes of `hf_tokenmixup.configuration.TokenMixupConfigMixin` and of `CctConfig`.

    Raises:
        ValueError: if a setting is out of range or does not fit the model.
    """

    # Training checkpoints are loaded with this package, so no code is saved with them.
    _auto_class = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_tokenmixup_config()

    @property
    def network(self) -> Network:
        """Sizes of the network. The classifier reads the CLS token, or all tokens (sequence pooling)."""
        has_cls_token = self.pooling == "cls"
        return Network(
            hidden_size=self.hidden_size,
            num_layers=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            mlp_size=self.intermediate_size,
            image_size=height_and_width(self.image_size),
            patch_size=height_and_width(self.patch_size) if self.tokenizer == "patch" else None,
            num_prefix_tokens=int(has_cls_token),
            classifier_pooling="cls" if has_cls_token else "attention",
        )

    @property
    def architecture_name(self) -> str:
        """Name of the architecture with its size, such as `CCT-7/3x1`."""
        layers = self.num_hidden_layers
        return {
            ("convolution", "sequence"): f"CCT-{layers}/{self.conv_kernel_size}x{self.num_conv_layers}",
            ("patch", "sequence"): f"CVT-{layers}/{self.patch_size}",
            ("patch", "cls"): f"ViT-Lite-{layers}/{self.patch_size}",
        }.get((self.tokenizer, self.pooling), "Compact Transformer (CCT)")

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of patch tokens for an image size in pixels."""
        return self.grid_size(height, width)


class VerticalCctAttention(CctAttention):
    """Self-attention with additional keys and values from a memory of salient tokens, Eq. (13).

    In layers that mix or provide tokens, it takes the projection that their saliency was computed from.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
        projected: torch.Tensor | None = None,
        received: list[torch.Tensor] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend to the tokens and to the memory.

        Args:
            hidden_states: (B, N, D) normalized tokens.
            attention_mask: as in the base class; ignored if there is a memory.
            memory: (B, M, D) normalized tokens of earlier layers; None calls the base class.
            projected: (B, N, 3 * D) queries, keys and values of the tokens; `memory` must be None.
            received: list to which the saliency (B, N) of the tokens is appended, see `attend_and_detect`. So hooks
                receive the usual output.
            kwargs: keyword arguments of the attention function.

        Returns:
            (B, N, D) tokens and the attention weights (B, H, N, N + M), None if not available.
        """
        if projected is not None and received is not None:
            attn_output, attn_weights, saliency = self.attend_and_detect(projected)
            received.append(saliency)
            return attn_output, attn_weights
        if projected is not None:
            return self.attend(*self.split_heads(projected, 3), attention_mask, **kwargs)
        if memory is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        query, key, value = self.query_key_value(torch.cat([hidden_states, memory], dim=1))
        return self.attend(query[:, :, : hidden_states.shape[1]], key, value, **kwargs)

    def computes_map(self, projected: torch.Tensor) -> bool:
        """Whether the attention function computes complete maps, in the precision that saliency requires.

        "eager" always does. On a CPU, "sdpa" does with dropout. Functions that a user registered are
        called as they are.

        Args:
            projected: (B, N, 3 * D) queries, keys and values of the tokens.
        """
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        on_cpu, has_dropout = projected.device.type == "cpu", self.training and self.attention_dropout > 0
        has_map = interface is eager_attention_forward or (
            interface is sdpa_attention_forward and on_cpu and has_dropout
        )
        return has_map and projected.dtype in (torch.float32, torch.float64)

    def attend_and_detect(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attend to the tokens, and detect their saliency from the same attention map, Eq. (2).

        The output and its gradient are those of `attend`, and the saliency that of
        `hf_tokenmixup.saliency.received_attention`, to rounding in float32.

        Args:
            projected: (B, N, 3 * D) queries, keys and values of the tokens.

        Returns:
            (B, N, D) tokens; the attention weights (B, H, N, N), with dropout; and the saliency (B, N) without
            gradient and dropout, averaged over heads and queries.
        """
        query, key, value = self.split_heads(projected, 3)
        weights = ((query * self.scaling) @ key.mT).softmax(dim=-1)
        saliency = weights.detach().mean(dim=(1, 2))
        weights = F.dropout(weights, self.attention_dropout, self.training)
        attn_output = (weights @ value).transpose(1, 2).flatten(2)
        return self.dropout(self.proj(attn_output)), weights, saliency


class TokenMixupCctLayer(TokenMixupLayerMixin, CctLayer):
    """CCT layer with TokenMixup: mixes its input (HTM) and attends to salient tokens of earlier layers (VTM)."""

    vertical_attention_class = VerticalCctAttention

    @property
    def input_projection(self) -> nn.Linear:
        """See `TokenMixupLayerMixin`."""
        return self.attention.qkv

    def base_forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        memory: torch.Tensor | None,
        attn_output: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Apply the base layer, with a memory (B, M, D) or with the output (B, N, D) of its attention."""
        if attn_output is None:
            return super().base_forward(hidden_states, attention_mask, memory, **kwargs)
        return self.feed_forward(hidden_states + self.drop_path(attn_output))

    def compute_query_key(
        self,
        hidden: torch.Tensor,
        cls_query_only: bool,
        memory: torch.Tensor | None = None,
        projected: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> QueryKey:
        """See `hf_tokenmixup.saliency.SupportsAttentionSaliency`. `projected` has the values of `project_input`."""
        attention, sources = self.attention, hidden if memory is None else torch.cat([hidden, memory], dim=1)
        if projected is not None:
            query, key = _copy_for_products(attention.split_heads(projected, 3)[:2])
            return QueryKey(query, key, attention.scaling)
        normed, num_queries = self.apply_pre_norm(sources), 1 if cls_query_only else hidden.shape[1]
        if not has_plain_weight(attention.qkv):
            query, key, _ = attention.query_key_value(normed)
            return QueryKey(query[:, :, :num_queries], key, attention.scaling)
        query_weight, key_weight, _ = attention.qkv.weight.chunk(3)
        if cls_query_only:
            query = attention.split_heads(F.linear(normed[:, :1], query_weight), 1)[0]
            return QueryKey(project_queries_to_inputs(query, key_weight), normed[:, None], attention.scaling)
        query_key = F.linear(normed, attention.qkv.weight[: 2 * len(key_weight)])
        query, key = _copy_for_products(attention.split_heads(query_key, 2))
        return QueryKey(query[:, :, :num_queries], key, attention.scaling)

    def forward_with_attention(self, hidden: torch.Tensor, attention: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """See `hf_tokenmixup.saliency.SupportsAttentionSaliency`."""
        _, _, value = self.attention.query_key_value(self.apply_pre_norm(hidden))
        attn_output = self.attention.proj((attention.to(value.dtype) @ value).transpose(1, 2).flatten(2))
        hidden = self.norm1(hidden + attn_output)
        return hidden + self.linear2(self.activation(self.linear1(hidden)))


def _copy_for_products(query_key: torch.Tensor) -> torch.Tensor:
    """Lay out queries and keys (2, B, H, N, d) for their product in one copy, instead of one for each operand.

    On a CPU, the product is computed in chunks, which need no copy or one that fits in the cache.
    """
    return query_key if query_key.device.type == "cpu" else query_key.contiguous()


class TokenMixupCctForImageClassification(TokenMixupModelMixin, CctForImageClassification):
    """`CctForImageClassification` with TokenMixup in training mode. In evaluation mode it is the base model.

    Raises:
        ValueError: if the configuration has no settings of TokenMixup, or invalid ones.
    """

    _auto_class = None
    config_class = TokenMixupCctConfig
    base_model_class = CctForImageClassification
    layer_class = TokenMixupCctLayer
    lora_target_modules = ("qkv",)
