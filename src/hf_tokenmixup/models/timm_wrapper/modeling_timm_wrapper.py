"""Image classifier of timm with TokenMixup."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel, TimmWrapperForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from ..modeling_tokenmixup import TokenMixupModelMixin
from ..outputs import TokenMixupContext
from .configuration_timm_wrapper import TokenMixupTimmWrapperConfig
from .layers_timm_wrapper import TimmLayerMixin


class _TimmClassifier(TimmWrapperForImageClassification):
    """`TimmWrapperForImageClassification` whose forward pass has a context for the layers."""

    def post_init(self):
        """Initialize weights and gradient checkpointing, before the layers are converted."""
        for block in self.timm_model.blocks:
            block.gradient_checkpointing = False
        super().post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        tokenmixup: TokenMixupContext | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple[torch.Tensor, ...]:
        """Classify images. With a context, the layers mix tokens and there is no loss.

        Args:
            pixel_values: (B, 3, height, width) images.
            labels: as in the base class.
            tokenmixup: context of the forward pass; None calls the base class.
            kwargs: keyword arguments of the base class.

        Raises:
            ValueError: if the model does not accept images of this size, or arguments are not supported while tokens
                are mixed.
        """
        self._validate_size(*pixel_values.shape[2:])
        if tokenmixup is None:
            return super().forward(pixel_values, labels=labels, **kwargs)
        kwargs.pop("return_dict", None)
        for name in ("output_attentions", "output_hidden_states", "attn_mask"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"`{name}` is not supported while tokens are mixed. Remove it.")
        features = self._compute_features(pixel_values.to(self.device, self.dtype), tokenmixup, kwargs)
        return ImageClassifierOutput(logits=self.timm_model.forward_head(features))

    def _compute_features(
        self, pixel_values: torch.Tensor, tokenmixup: TokenMixupContext, layer_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Compute what `forward_features` of timm computes, with a context for the layers."""
        model = self.timm_model
        hidden, rope = model._pos_embed(model.patch_embed(pixel_values)), None
        if isinstance(hidden, tuple):
            hidden, rope = hidden
        hidden = model.norm_pre(hidden)
        if rope is not None:
            # Layers with positions of their own select them, so that an attention rollout has those of each layer.
            layer_kwargs = {**layer_kwargs, "rope": rope}
        for layer in self.get_transformer_layers():
            hidden = layer(hidden, tokenmixup=tokenmixup, **layer_kwargs)
        return model.norm(hidden)

    def _validate_size(self, height: int, width: int) -> None:
        patch_embed = self.timm_model.patch_embed
        expected = tuple(patch_embed.img_size)
        if getattr(patch_embed, "strict_img_size", True) and (height, width) != expected:
            raise ValueError(
                f"{self.config.architecture} expects images of {expected[0]}x{expected[1]} pixels, got "
                f"{height}x{width}. Load the model with image_size=[{height}, {width}]. For images of several sizes, "
                'set "dynamic_img_size": true in `model_args`.'
            )


class TokenMixupTimmWrapperForImageClassification(TokenMixupModelMixin, _TimmClassifier):
    """`TimmWrapperForImageClassification` with TokenMixup in training mode. In evaluation mode it is the base model.

    `from_pretrained` loads checkpoints of timm on the Hub: `from_pretrained("timm/vit_small_patch16_dinov3.lvd1689m",
    num_labels=10, horizontal_layers=[3])`.

    Rotary positions belong to the slots of tokens: a token that HTM replaces has the position of its new slot, and a
    token that VTM collects has the position of the slot from which it comes.

    Raises:
        ValueError: if the configuration has no settings of TokenMixup, or invalid ones, or the layers of the
            architecture do not support TokenMixup.
    """

    config_class = TokenMixupTimmWrapperConfig
    base_model_class = TimmWrapperForImageClassification
    layer_class = TimmLayerMixin
    lora_target_modules = ("qkv",)
    head_names = ("head", "head_dist")
    takes_interpolate_pos_encoding = False

    # timm's own loop would checkpoint the mixing. Each layer checkpoints the block of timm instead.
    _set_gradient_checkpointing = PreTrainedModel._set_gradient_checkpointing

    def get_transformer_layers(self) -> nn.ModuleList | nn.Sequential:
        """Return the transformer layers."""
        return self.timm_model.blocks

    def _convert_layers(self) -> None:
        super()._convert_layers()
        if self.timm_model.grad_checkpointing:
            self.timm_model.set_grad_checkpointing(False)
            self._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))

    def _restore_layers(self) -> None:
        is_checkpointed = self.is_activation_checkpointing
        super()._restore_layers()
        for layer in self.get_transformer_layers():
            for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
                vars(layer).pop(name, None)
        self.timm_model.set_grad_checkpointing(is_checkpointed)

    def get_lora_target_modules(self) -> tuple[str, ...]:
        """Return the default target modules of LoRA. Without a fused projection they are `q_proj` and `v_proj`."""
        is_fused = getattr(self.get_transformer_layers()[0].attn, "qkv", None) is not None
        return self.lora_target_modules if is_fused else ("q_proj", "v_proj")

    def resize_positions(self, config: PreTrainedConfig) -> None:
        """Interpolate positions to the image size of `config`, in place, as timm does."""
        self.timm_model.set_input_size(img_size=config.network.image_size)
