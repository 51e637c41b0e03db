"""Blocks and attention of timm with TokenMixup."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.layers.attention import Attention
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F

from ...configuration import TokenMixupConfigMixin
from ...saliency import QueryKey, eval_mode, project_queries_to_inputs
from ..layers import TokenMixupLayerMixin, has_plain_weight

_QUERY, _KEY, _VALUE = range(3)


class VerticalTimmAttentionMixin(nn.Module):
    """Self-attention with additional keys and values from a memory of salient tokens, Eq. (13).

    Precedes the attention of timm among the base classes.
    """

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """Attend to the tokens and to the memory.

        Args:
            x: (B, N, D) normalized tokens.
            memory: (B, M, D) normalized tokens of earlier layers; None calls the base class.
            kwargs: arguments of the base class. With a memory, `rope` has T + M rows.

        Returns:
            (B, N, D) tokens.
        """
        if memory is None:
            return super().forward(x, **kwargs)
        # The rows of the memory are computed and removed: they are few, and each attention has other projections.
        return super().forward(torch.cat([x, memory], dim=1), **kwargs)[:, : x.shape[1]]


class VerticalAttention(VerticalTimmAttentionMixin, Attention):
    """`Attention` of timm with a memory of salient tokens."""


class VerticalEvaAttention(VerticalTimmAttentionMixin, EvaAttention):
    """`EvaAttention` of timm with a memory of salient tokens."""


class VerticalAttentionRope(VerticalTimmAttentionMixin, AttentionRope):
    """`AttentionRope` of timm with a memory of salient tokens."""


class TimmLayerMixin(TokenMixupLayerMixin):
    """Block of timm with TokenMixup. Precedes the block of timm among the base classes.

    A subclass defines `scale_branch(branch, output)`, LayerScale of the output (B, N, D) of attention or of the MLP.
    """

    # `PreTrainedModel` turns gradient checkpointing on where a module has this attribute.
    gradient_checkpointing = False

    @classmethod
    def from_layer(cls, layer: nn.Module, config: TokenMixupConfigMixin, layer_index: int) -> TokenMixupLayerMixin:
        """Convert a block of timm, in place, to the class for its own class."""
        return super(TimmLayerMixin, LAYER_CLASSES[type(layer)]).from_layer(layer, config, layer_index)

    @property
    def vertical_attention_class(self) -> type[nn.Module]:
        """Class of the attention of this layer if it is vertical."""
        return VERTICAL_ATTENTION_CLASSES[type(self.attn)]

    @property
    def attention_module(self) -> nn.Module:
        """The self-attention of the layer."""
        return self.attn

    @property
    def pre_norm(self) -> nn.Module:
        """The normalization before attention."""
        return self.norm1

    def forward(self, x: torch.Tensor, *, attn_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """Apply TokenMixup, then the block of timm.

        Args:
            x: (B, N, D) tokens.
            attn_mask: as in timm.
            kwargs: keyword arguments of the block of timm, such as `rope`, and `tokenmixup`.
        """
        if hasattr(getattr(self.attn, "qkv", None), "base_layer"):
            # `EvaAttention` would use the weight of its projection without the adapters of peft.
            self.attn.qkv_bias_separate = True
        return super().forward(x, attn_mask, **kwargs)

    def add_memory_positions(
        self, layer_kwargs: Mapping[str, Any], positions_fn: Callable[[], torch.Tensor]
    ) -> Mapping[str, Any]:
        """Give each token of the memory the rotary position of the slot from which it comes."""
        rope = self._select_rope(layer_kwargs.get("rope"))
        if rope is None:
            return layer_kwargs
        positions = positions_fn()
        rope = rope[None] if rope.dim() == 2 else rope  # (H or 1, T, d)
        memory_rope = rope[:, positions].transpose(0, 1)  # (B, H or 1, M, d)
        return {**layer_kwargs, "rope": torch.cat([rope.expand(len(positions), -1, -1, -1), memory_rope], dim=2)}

    def compute_query_key(
        self,
        hidden: torch.Tensor,
        cls_query_only: bool,
        memory: torch.Tensor | None = None,
        rope: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> QueryKey:
        """See `hf_tokenmixup.saliency.SupportsAttentionSaliency`."""
        attention, sources = self.attn, hidden if memory is None else torch.cat([hidden, memory], dim=1)
        normed, num_queries = self.apply_pre_norm(sources), 1 if cls_query_only else hidden.shape[1]
        query = attention.q_norm(_project(attention, normed[:, :num_queries], _QUERY))
        if memory is None:
            rope = self._select_rope(rope)
        # The query of the CLS token has no rotary position.
        if cls_query_only and rope is None and isinstance(attention.k_norm, nn.Identity):
            weight = _get_plain_weight(attention, _KEY)
            if weight is not None and len(weight) == attention.num_heads * attention.head_dim:
                return QueryKey(project_queries_to_inputs(query, weight), normed[:, None], attention.scale)
        key = attention.k_norm(_project(attention, normed, _KEY))
        if rope is not None:
            num_patches = num_queries - attention.num_prefix_tokens
            query, key = _rotate(attention, query, rope[..., : max(0, num_patches), :]), _rotate(attention, key, rope)
        return QueryKey(query, _repeat_heads(attention, key), attention.scale)

    def attention_weights(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """See `hf_tokenmixup.saliency.SupportsAttentionSaliency`."""
        query, key, scale, _ = self.compute_query_key(hidden, cls_query_only=False, **kwargs)
        return (query * scale @ key.transpose(2, 3)).softmax(dim=-1)

    def forward_with_attention(self, hidden: torch.Tensor, attention: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """See `hf_tokenmixup.saliency.SupportsAttentionSaliency`."""
        hidden = hidden + self.scale_branch(1, self._attend(hidden, attention))
        with eval_mode(self.mlp):
            return hidden + self.scale_branch(2, self.mlp(self.norm2(hidden)))

    def base_forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, memory: torch.Tensor | None, **kwargs
    ) -> torch.Tensor:
        """Apply the block of timm. A memory (B, M, D) adds M keys and values to its attention."""
        if memory is None:
            if "rope" in kwargs:
                kwargs["rope"] = self._select_rope(kwargs["rope"])
            return super(TokenMixupLayerMixin, self).forward(hidden_states, attn_mask=attention_mask, **kwargs)
        attention_kwargs = {"memory": self.norm1(memory), **kwargs}
        attn_output = self.attn(self.norm1(hidden_states), **attention_kwargs)
        hidden_states = hidden_states + self.drop_path1(self.scale_branch(1, attn_output))
        return hidden_states + self.drop_path2(self.scale_branch(2, self.mlp(self.norm2(hidden_states))))

    def _select_rope(self, rope: torch.Tensor | None) -> torch.Tensor | None:
        """Select the rotary positions of this layer if they are those of all layers, (L, H, T, d)."""
        return rope if rope is None or rope.dim() < 4 else rope[self.layer_index]

    def _attend(self, hidden: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        module, normed = self.attn, self.apply_pre_norm(hidden)
        value = _repeat_heads(module, _project(module, normed, _VALUE))
        output = module.norm((attention.to(value.dtype) @ value).transpose(1, 2).flatten(2))
        return module.proj(output)


class TokenMixupBlock(TimmLayerMixin, Block):
    """`Block` of timm with TokenMixup: mixes its input (HTM) and attends to salient tokens of earlier layers (VTM)."""

    def scale_branch(self, branch: int, output: torch.Tensor) -> torch.Tensor:
        """Apply LayerScale to the output (B, N, D) of attention (1) or of the MLP (2)."""
        return (self.ls1 if branch == 1 else self.ls2)(output)


class TokenMixupEvaBlock(TimmLayerMixin, EvaBlock):
    """`EvaBlock` of timm with TokenMixup, as `TokenMixupBlock`."""

    def scale_branch(self, branch: int, output: torch.Tensor) -> torch.Tensor:
        """Apply LayerScale, if the block has it, to the output (B, N, D) of attention (1) or of the MLP (2)."""
        gamma = self.gamma_1 if branch == 1 else self.gamma_2
        return output if gamma is None else gamma * output


LAYER_CLASSES = {Block: TokenMixupBlock, EvaBlock: TokenMixupEvaBlock}
VERTICAL_ATTENTION_CLASSES = {
    Attention: VerticalAttention,
    EvaAttention: VerticalEvaAttention,
    AttentionRope: VerticalAttentionRope,
}


def find_unsupported_layer(blocks: Iterable[nn.Module]) -> str | None:
    """Return the class names of the first block, with its attention, that cannot be converted; None: there is none."""
    for block in blocks:
        if type(block) not in LAYER_CLASSES:
            return type(block).__name__
        if type(block.attn) not in VERTICAL_ATTENTION_CLASSES:
            return f"{type(block).__name__} with {type(block.attn).__name__}"
        if getattr(block.attn, "gate", None) is not None:
            # Architectures of the supported classes have no gates, so that nothing here was tested with one.
            return f"{type(block).__name__} with gated {type(block.attn).__name__}"
    return None


def _project(attention: nn.Module, normed: torch.Tensor, index: int) -> torch.Tensor:
    """Project tokens (B, N, D) to queries (0), keys (1) or values (2), (B, H, N, d), before their normalization."""
    if getattr(attention, "qkv", None) is None:
        projected = (attention.q_proj, attention.k_proj, attention.v_proj)[index](normed)
    elif (weight := _get_plain_weight(attention, index)) is not None:
        bias = attention.qkv.bias
        projected = F.linear(normed, weight, None if bias is None else bias.chunk(3)[index])
    else:
        projected = attention.qkv(normed).chunk(3, dim=-1)[index]
    # `EvaAttention` with a fused projection has its biases as parameters of its own.
    bias = (getattr(attention, name, None) for name in ("q_bias", "k_bias", "v_bias"))
    if (separate_bias := tuple(bias)[index]) is not None:
        projected = projected + separate_bias
    return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def _get_plain_weight(attention: nn.Module, index: int) -> torch.Tensor | None:
    """Return the weight of a projection; None if it has adapters, hooks or other wrappers."""
    fused = attention.qkv is not None
    projection = attention.qkv if fused else (attention.q_proj, attention.k_proj, attention.v_proj)[index]
    if not has_plain_weight(projection):
        return None
    return projection.weight.chunk(3)[index] if fused else projection.weight


def _rotate(attention: nn.Module, states: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys (B, H, N, d) of patch tokens, as timm does."""
    if states.shape[2] <= attention.num_prefix_tokens:
        return states
    prefix, patches = states.split([attention.num_prefix_tokens, states.shape[2] - attention.num_prefix_tokens], dim=2)
    half = {"half": True} if getattr(attention, "rotate_half", False) else {}
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, **half).to(states.dtype)], dim=2)


def _repeat_heads(attention: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Repeat keys or values that several query heads share (grouped-query attention)."""
    groups = getattr(attention, "num_kv_groups", 1)
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)
