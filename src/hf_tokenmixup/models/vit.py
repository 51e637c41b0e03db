"""TokenMixup for the Vision Transformer of transformers (paper: section 4, ViT-B/16 on ImageNet-1k).

The layers of transformers' `ViTModel` are converted. The class of the model itself stays, since transformers renames
checkpoint keys by model class.
"""

from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer, eager_attention_forward

from ..configuration import TokenMixupConfigMixin
from ..network import Network
from ..saliency import project_queries_to_inputs
from .cct.configuration_cct import height_and_width
from .layers import TokenMixupLayerMixin, has_plain_weight
from .modeling_tokenmixup import TokenMixupModelMixin


class TokenMixupViTConfig(TokenMixupConfigMixin, ViTConfig):
    """`ViTConfig` with the settings of TokenMixup.

    The model type is `"vit"`: every ViT checkpoint can be loaded, and exported models load as a standard ViT.

    Args:
        kwargs: attributes of `hf_tokenmixup.configuration.TokenMixupConfigMixin` and of `ViTConfig`.

    Raises:
        ValueError: if a setting is out of range or does not fit the model.
    """

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_tokenmixup_config()

    @property
    def network(self) -> Network:
        """Sizes of the network. The classifier reads the CLS token."""
        return Network(
            hidden_size=self.hidden_size,
            num_layers=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            mlp_size=self.intermediate_size,
            image_size=height_and_width(self.image_size),
            patch_size=height_and_width(self.patch_size),
            num_prefix_tokens=1,
            classifier_pooling="cls",
        )


class VerticalViTAttention(ViTAttention):
    """Self-attention with additional keys and values from a memory of salient tokens, Eq. (13)."""

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
            attention_mask: as in the base class; ignored if there is a memory.
            memory: (B, M, D) normalized tokens of earlier layers; None calls the base class.
            kwargs: keyword arguments of the attention function.

        Returns:
            (B, N, D) tokens and the attention weights (B, H, N, N + M), None if not available.
        """
        if memory is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        key_value_states = torch.cat([hidden_states, memory], dim=1)
        # The model rejects masks of users while tokens are mixed. Some versions of transformers create a mask for
        # torch.compile, which masks nothing and has too few columns.
        no_mask = None
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            split_heads(self, self.q_proj(hidden_states)),
            split_heads(self, self.k_proj(key_value_states)),
            split_heads(self, self.v_proj(key_value_states)),
            no_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attn_output.flatten(2)), attn_weights


class TokenMixupViTLayer(TokenMixupLayerMixin, ViTLayer):
    """ViT layer with TokenMixup: mixes its input (HTM) and attends to salient tokens of earlier layers (VTM)."""

    vertical_attention_class = VerticalViTAttention

    @property
    def pre_norm(self) -> torch.nn.LayerNorm:
        """The normalization before attention."""
        return self.layernorm_before

    def compute_query_key(
        self, hidden: torch.Tensor, cls_query_only: bool, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """See `hf_tokenmixup.saliency.SupportsAttentionSaliency`."""
        attention, normed = self.attention, self.apply_pre_norm(hidden)
        query = split_heads(attention, attention.q_proj(normed[:, :1] if cls_query_only else normed))
        if cls_query_only and has_plain_weight(attention.k_proj):
            return project_queries_to_inputs(query, attention.k_proj.weight), normed[:, None], attention.scaling
        return query, split_heads(attention, attention.k_proj(normed)), attention.scaling

    def forward_with_attention(self, hidden: torch.Tensor, attention: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """See `hf_tokenmixup.saliency.SupportsAttentionSaliency`."""
        value = split_heads(self.attention, self.attention.v_proj(self.apply_pre_norm(hidden)))
        attn_output = (attention.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        hidden = hidden + self.attention.o_proj(attn_output)
        return hidden + self.mlp(self.layernorm_after(hidden))


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


MODEL_TYPES = {"vit": (TokenMixupViTConfig, TokenMixupViTForImageClassification)}


def split_heads(attention: ViTAttention, states: torch.Tensor) -> torch.Tensor:
    """Reshape states (B, N, H * d) to (B, H, N, d)."""
    return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
