"""Compact Transformers (Hassani et al., "Escaping the Big Data Paradigm", 2021): CCT, CVT and ViT-Lite.

Shapes: B images, N tokens of which T come from the image, D hidden size, H heads of width d, C classes.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.beit.modeling_beit import BeitDropPath
from transformers.models.vit.modeling_vit import eager_attention_forward
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_cct import CctConfig, height_and_width


class CctTokenizer(nn.Module):
    """Convert images (B, channels, height, width) to tokens (B, T, D)."""

    def __init__(self, config: CctConfig):
        super().__init__()
        self.num_channels = config.num_channels
        if config.tokenizer == "patch":
            size = config.patch_size
            self.layers = nn.ModuleList([nn.Conv2d(config.num_channels, config.hidden_size, size, size)])
            self.pool = None
            return
        inner_channels = [config.conv_channels] * (config.num_conv_layers - 1)
        channels = [config.num_channels, *inner_channels, config.hidden_size]
        self.layers = nn.ModuleList(
            nn.Conv2d(
                channels[index],
                channels[index + 1],
                config.conv_kernel_size,
                config.conv_stride,
                config.conv_padding,
                bias=False,
            )
            for index in range(config.num_conv_layers)
        )
        self.pool = nn.MaxPool2d(config.pooling_kernel_size, config.pooling_stride, config.pooling_padding)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.shape[1] != self.num_channels:
            raise ValueError(f"Expected images with {self.num_channels} channels, got {pixel_values.shape[1]}.")
        # With channels last, the output has the memory order of (B, T, D). A small model on a CPU takes a third less
        # time.
        hidden = pixel_values.contiguous(memory_format=torch.channels_last)
        for convolution in self.layers:
            hidden = convolution(hidden)
            if self.pool is not None:
                # Pooling first leaves fewer elements for the ReLU. Values and gradients are bit-identical.
                hidden = nn.functional.relu(self.pool(hidden))
        return hidden.flatten(2).transpose(1, 2)


class CctEmbeddings(nn.Module):
    """Embed images as tokens with positions. An optional CLS token precedes the patch tokens."""

    def __init__(self, config: CctConfig):
        super().__init__()
        self.config = config
        self.tokenizer = CctTokenizer(config)
        length = config.num_patch_tokens + config.num_prefix_tokens
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.pooling == "cls" else None
        learned = config.position_embedding == "learned"
        self.position_embeddings = nn.Parameter(torch.zeros(1, length, config.hidden_size)) if learned else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None) -> torch.Tensor:
        hidden = self.tokenizer(pixel_values)
        if self.cls_token is not None:
            hidden = torch.cat([self.cls_token.expand(len(hidden), -1, -1), hidden], dim=1)
        if self.config.position_embedding == "sinusoidal":
            hidden = hidden + build_sincos_position_embedding(hidden.shape[1], hidden.shape[2], hidden.device).to(
                hidden.dtype
            )
        elif self.config.position_embedding == "learned":
            hidden = hidden + self.learned_positions(*pixel_values.shape[2:], interpolate_pos_encoding)
        return self.dropout(hidden)

    def learned_positions(self, height: int, width: int, interpolate: bool | None) -> torch.Tensor:
        """Return the learned positions (1, N, D) for an image size in pixels.

        Raises:
            ValueError: if the size is not the configured one and `interpolate` is not True.
        """
        trained_size = height_and_width(self.config.image_size)
        if (height, width) == trained_size:
            return self.position_embeddings
        if not interpolate:
            raise ValueError(
                f"The learned positions are for images of {trained_size[0]}x{trained_size[1]} pixels, got "
                f"{height}x{width}. Resize the images or pass interpolate_pos_encoding=True."
            )
        grid, new_grid = self.config.grid_size(*trained_size), self.config.grid_size(height, width)
        return interpolate_positions(self.position_embeddings, grid, new_grid)


def interpolate_positions(positions: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Interpolate learned positions to another grid, bicubic as transformers' `interpolate_pos_encoding`.

    Args:
        positions: (1, P + rows * columns, D), prefix tokens first.
        grid: rows and columns of `positions`.
        new_grid: rows and columns of the result.

    Returns:
        (1, P + new rows * new columns, D) in the same dtype. Positions of prefix tokens are unchanged.
    """
    prefix = positions.shape[1] - grid[0] * grid[1]
    image = positions[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2)
    # Some devices have no bicubic kernel in half precision.
    image = nn.functional.interpolate(image.float(), size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :prefix], image.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


def build_sincos_position_embedding(length: int, hidden_size: int, device: torch.device) -> torch.Tensor:
    """Return sinusoidal positions (1, N, D): sines in even channels, cosines in odd channels."""
    channel = torch.arange(hidden_size, device=device, dtype=torch.float32)
    period = 10000 ** (2 * (channel // 2) / hidden_size)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] / period
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())[None]


class CctAttention(nn.Module):
    """Self-attention with one fused projection for queries, keys and values, in this order."""

    def __init__(self, config: CctConfig):
        super().__init__()
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def query_key_value(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Project tokens (B, N, D) to queries, keys and values (B, H, N, d)."""
        return self.split_heads(self.qkv(hidden_states), 3)

    def split_heads(self, projected: torch.Tensor, parts: int) -> torch.Tensor:
        """Reshape projections (B, N, parts * D) to (parts, B, H, N, d)."""
        return projected.unflatten(-1, (parts, self.num_attention_heads, self.head_dim)).permute(2, 0, 3, 1, 4)

    def attend(self, query, key, value, attention_mask=None, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention and the output projection.

        Args:
            query: (B, H, N, d).
            key: (B, H, M, d).
            value: (B, H, M, d).
            attention_mask: mask of the attention function.
            kwargs: keyword arguments of the attention function.

        Returns:
            (B, N, D) tokens and the attention weights (B, H, N, M), None if not available.
        """
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.dropout(self.proj(attn_output.flatten(2))), attn_weights

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.attend(*self.query_key_value(hidden_states), attention_mask, **kwargs)


class CctLayer(GradientCheckpointingLayer):
    """Transformer layer whose second residual connection starts after `norm1`, as in the released weights."""

    def __init__(self, config: CctConfig, layer_index: int):
        super().__init__()
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = CctAttention(config)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.linear1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = BeitDropPath(config.drop_path_rate * layer_index / max(config.num_hidden_layers - 1, 1))

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        attn_output, _ = self.attention(self.pre_norm(hidden_states), attention_mask, **kwargs)
        return self.feed_forward(hidden_states + self.drop_path(attn_output))

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the part of the layer after attention, (B, N, D) to (B, N, D)."""
        hidden_states = self.norm1(hidden_states)
        hidden = self.dropout(self.activation(self.linear1(hidden_states)))
        return hidden_states + self.drop_path(self.dropout(self.linear2(hidden)))


class CctPreTrainedModel(PreTrainedModel):
    config: CctConfig
    config_class = CctConfig
    base_model_prefix = "cct"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["CctEmbeddings", "CctLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": CctLayer, "attentions": CctAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, CctEmbeddings):
            if module.cls_token is not None:
                init.zeros_(module.cls_token)
            if module.position_embeddings is not None:
                init.trunc_normal_(module.position_embeddings, std=self.config.position_initializer_range)


class CctModel(CctPreTrainedModel):
    """Compact Transformer without classifier. `pooler_output` (B, D) is the input of the classifier."""

    def __init__(self, config: CctConfig):
        super().__init__(config)
        self.embeddings = CctEmbeddings(config)
        self.layers = nn.ModuleList(CctLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention_pool = nn.Linear(config.hidden_size, 1) if config.pooling == "sequence" else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.tokenizer

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        if pixel_values is None:
            raise ValueError("pixel_values is missing. Pass images of shape (B, channels, height, width).")
        weight = self.embeddings.tokenizer.layers[0].weight
        hidden_states = self.embeddings(pixel_values.to(weight.dtype), interpolate_pos_encoding)
        for layer in self.layers:
            hidden_states = layer(hidden_states, None, **kwargs)
        hidden_states = self.norm(hidden_states)
        if self.attention_pool is None:
            pooled = hidden_states[:, 0]
        else:
            weights = self.attention_pool(hidden_states).softmax(dim=1)  # (B, N, 1)
            pooled = (weights.transpose(1, 2) @ hidden_states).squeeze(1)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class CctForImageClassification(CctPreTrainedModel):
    """Compact Transformer with a linear classifier."""

    def __init__(self, config: CctConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.cct = CctModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (B, channels, height, width) images.
            labels: class indices (B,). The output then has a loss.
            interpolate_pos_encoding: interpolate the learned positions to the size of the images.
            kwargs: keyword arguments of the attention function and of the loss.

        Returns:
            An `ImageClassifierOutput` with the logits (B, C).
        """
        outputs = self.cct(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["CctForImageClassification", "CctModel", "CctPreTrainedModel"]
