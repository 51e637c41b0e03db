"""Attention with separate projections for queries, keys and values, as most families of transformers have it."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import eager_attention_forward

from ..saliency import QueryKey, project_queries_to_inputs
from .layers import TokenMixupLayerMixin, has_plain_weight


class VerticalAttentionMixin(nn.Module):
    """Self-attention with additional keys and values from a memory of salient tokens, Eq. (13).

    Precedes the attention of the base model among the base classes, which has `q_proj`, `k_proj` and `v_proj`. A
    family with other names of the other attributes defines them here. They apply to layers without a memory, too.
    """

    # Names of attributes of the base attention: output projection, factor of the dot products, dropout probability.
    out_proj_name = "o_proj"
    scaling_name = "scaling"
    dropout_name = "attention_dropout"

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend to the tokens and to the memory.

        Args:
            hidden_states: (B, N, D) normalized tokens.
            attention_mask: as in the base class. With a memory, only an additive bias (floating point) applies.
            memory: (B, M, D) normalized tokens of earlier layers; None calls the base class.
            kwargs: keyword arguments of the attention function.

        Returns:
            (B, N, D) tokens and the attention weights (B, H, N, N + M), None if not available.
        """
        if memory is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        key_value_states = torch.cat([hidden_states, memory], dim=1)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            split_heads(self, self.q_proj(hidden_states)),
            split_heads(self, self.k_proj(key_value_states)),
            split_heads(self, self.v_proj(key_value_states)),
            extend_bias(attention_mask, memory.shape[1]),
            dropout=getattr(self, self.dropout_name) if self.training else 0.0,
            scaling=getattr(self, self.scaling_name),
            **kwargs,
        )
        return getattr(self, self.out_proj_name)(attn_output.flatten(2)), attn_weights


class SeparateProjectionsMixin(TokenMixupLayerMixin):
    """Layer whose attention has separate projections. Precedes the base layer among the base classes."""

    vertical_attention_class: type[VerticalAttentionMixin]

    def compute_query_key(
        self, hidden: torch.Tensor, cls_query_only: bool, memory: torch.Tensor | None = None, **kwargs: Any
    ) -> QueryKey:
        """See `hf_tokenmixup.saliency.SupportsAttentionSaliency`."""
        attention, sources = self.attention_module, hidden if memory is None else torch.cat([hidden, memory], dim=1)
        scaling = getattr(attention, self.vertical_attention_class.scaling_name)
        normed, num_queries = self.apply_pre_norm(sources), 1 if cls_query_only else hidden.shape[1]
        # On a matrix, the projection and its bias are one operator.
        states = (
            attention.q_proj(normed[:, 0])[:, None] if cls_query_only else attention.q_proj(normed[:, :num_queries])
        )
        query, bias = split_heads(attention, states), self.attention_bias(**kwargs)
        if bias is not None:
            bias = extend_bias(bias[..., :num_queries, :], sources.shape[1] - hidden.shape[1])
        if cls_query_only and has_plain_weight(attention.k_proj):
            query, key = project_queries_to_inputs(query, attention.k_proj.weight), normed[:, None]
        else:
            key = split_heads(attention, attention.k_proj(normed))
        return QueryKey(query, key, scaling, bias)

    def attention_bias(self, **kwargs: Any) -> torch.Tensor | None:
        """Compute the additive term of the attention scores, such as relative positions.

        Args:
            kwargs: arguments of the layer.

        Returns:
            A term that is broadcast to (B, H, N, N); None: no term.
        """
        return None

    def attend(self, hidden: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """Compute the output (B, N, D) of the attention module from given attention probabilities.

        Args:
            hidden: (B, N, D) input of the layer.
            attention: (B, H, N, N) attention probabilities.
        """
        module = self.attention_module
        value = split_heads(module, module.v_proj(self.apply_pre_norm(hidden)))
        project = getattr(module, self.vertical_attention_class.out_proj_name)
        return project((attention.to(value.dtype) @ value).transpose(1, 2).flatten(2))


def extend_bias(mask: torch.Tensor | None, num_memory: int) -> torch.Tensor | None:
    """Extend an additive bias of the attention scores by columns of zeros for a memory.

    Args:
        mask: (B, H, Q, N), or of a shape that is broadcast to it.
        num_memory: M.

    Returns:
        (B, H, Q, N + M). None for masks of other dtypes: the model rejects masks of users while tokens are mixed, and
        those that some versions of transformers create for torch.compile mask nothing.
    """
    if not isinstance(mask, torch.Tensor) or not mask.is_floating_point():
        return None
    return F.pad(mask, (0, num_memory))


def split_heads(attention: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Reshape states (B, N, H * d) to (B, H, N, d)."""
    return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
