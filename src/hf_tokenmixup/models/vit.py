"""TokenMixup for the Vision Transformer of transformers (paper: section 4, ViT-B/16 on ImageNet-1k).

The layers are replaced inside transformers' own ``ViTModel``: its renaming of checkpoint keys goes by that class.
"""

from collections.abc import Iterable

import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer, eager_attention_forward

from ..configuration import TokenMixupConfigMixin
from ..saliency import queries_of_inputs
from .layers import TokenMixupLayerMixin, has_plain_weight
from .modeling_tokenmixup import TokenMixupModelMixin


class TokenMixupViTConfig(TokenMixupConfigMixin, ViTConfig):
    """``ViTConfig`` with the settings of TokenMixup as further attributes.

    The model type stays ``"vit"``, so that any ViT checkpoint comes in and a published one opens as a plain ViT.

    Args:
        kwargs: settings of :class:`~hf_tokenmixup.configuration.TokenMixupConfigMixin` and of ``ViTConfig``.

    Raises:
        ValueError: for a setting out of its range or not fitting the network.
    """

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_tokenmixup_config()

    @property
    def num_prefix_tokens(self) -> int:
        """P: the CLS token."""
        return 1

    @property
    def num_patch_tokens(self) -> int:
        """T at the configured image size."""
        rows, columns = self.token_grid(*_pair(self.image_size))
        return rows * columns

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patch tokens of an image of this size."""
        patch_height, patch_width = _pair(self.patch_size)
        return height // patch_height, width // patch_width


class VerticalViTAttention(ViTAttention):
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
        sources = torch.cat([hidden_states, memory], dim=1)
        # A mask of the user's is refused while tokens are mixed, so one that is here hides nothing (some versions of
        # the host make such a mask under torch.compile) and would only have too few columns.
        no_mask = None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, weights = attend(
            self,
            split_heads(self, self.q_proj(hidden_states)),
            split_heads(self, self.k_proj(sources)),
            split_heads(self, self.v_proj(sources)),
            no_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attended.flatten(2)), weights


class TokenMixupViTLayer(TokenMixupLayerMixin, ViTLayer):
    """A ViT layer that mixes the tokens that enter it (HTM), hands tokens on to later layers and takes them (VTM).

    Args:
        config: with the settings of TokenMixup.
        layer_index: the layer's number, from 0.
    """

    def __init__(self, config: TokenMixupViTConfig, layer_index: int):
        super().__init__(config)
        if layer_index in config.vertical_layers:
            self.attention = VerticalViTAttention(config)
        self.init_tokenmixup(config, layer_index)

    @property
    def pre_norm(self) -> torch.nn.LayerNorm:
        """The norm in front of attention."""
        return self.layernorm_before

    def query_and_key(self, hidden: torch.Tensor, cls_query_only: bool) -> tuple[torch.Tensor, torch.Tensor, float]:
        """See :class:`~hf_tokenmixup.saliency.SupportsAttentionSaliency`."""
        attention, normed = self.attention, self.normed(hidden)
        query = split_heads(attention, attention.q_proj(normed[:, :1] if cls_query_only else normed))
        if cls_query_only and has_plain_weight(attention.k_proj):
            return queries_of_inputs(query, attention.k_proj.weight), normed[:, None], attention.scaling
        return query, split_heads(attention, attention.k_proj(normed)), attention.scaling

    def propagate(self, hidden: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """See :class:`~hf_tokenmixup.saliency.SupportsAttentionSaliency`."""
        value = split_heads(self.attention, self.attention.v_proj(self.normed(hidden)))
        attended = (attention.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        hidden = hidden + self.attention.o_proj(attended)
        return hidden + self.mlp(self.layernorm_after(hidden))


class TokenMixupViTForImageClassification(TokenMixupModelMixin, ViTForImageClassification):
    """``ViTForImageClassification`` that mixes tokens in training, and is the plain model otherwise.

    ``from_pretrained`` opens any ViT checkpoint; settings go to the configuration:
    ``from_pretrained("google/vit-base-patch16-224", horizontal_layers=[3], vertical_layers=[4])``.

    Raises:
        ValueError: for a configuration without the settings of TokenMixup, or with invalid ones.
    """

    config_class = TokenMixupViTConfig
    base_model_class = ViTForImageClassification
    layer_class = TokenMixupViTLayer
    lora_target_modules = ("q_proj", "v_proj")


def split_heads(attention: ViTAttention, states: torch.Tensor) -> torch.Tensor:
    """(B, N, H * d) to (B, H, N, d)."""
    return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def _pair(size: int | Iterable[int]) -> tuple[int, int]:
    return tuple(size) if isinstance(size, Iterable) else (size, size)
