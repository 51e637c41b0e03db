"""Mixin that applies TokenMixup before a transformer layer, for all model families."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.models.vit.modeling_vit import eager_attention_forward

from ..configuration import TokenMixupConfigMixin
from ..functional import gather_rows, manifold_mix, mix_with_partner
from ..horizontal import ScoreNet, apply_horizontal_mixup
from ..saliency import attention_saliency, eval_mode, random_saliency
from .gradient_checkpointing import checkpoint_layer
from .known_projection import KnownProjection
from .outputs import TokenMixupContext
from .peft_utils import find_adapter_layers

_PLAIN_LAYER = "_plain_layer"
# Arguments of a layer that do not change its attention map.
_OUTPUT_FLAGS = {"output_attentions", "output_hidden_states", "return_dict"}


class PlainLayer(NamedTuple):
    """What `TokenMixupLayerMixin.from_layer` changed in a layer.

    Attributes:
        classes: previous classes of modules by their names in the layer, `""` for the layer itself.
        attributes: previous values of attributes of the layer.
        added: names of the layer's new attributes and modules.
    """

    classes: dict[str, type[nn.Module]]
    attributes: dict[str, Any]
    added: list[str]


class ProjectedInput(NamedTuple):
    """Input of a layer that was projected once, for the saliency of its tokens and for its attention.

    Attributes:
        normed: (B, N, D) normalized tokens.
        values: (B, N, 3 * D) queries, keys and values of the tokens.
    """

    normed: torch.Tensor
    values: torch.Tensor


class TokenMixupLayerMixin(nn.Module):
    """Mixin that applies TokenMixup before a transformer layer. Precedes the base layer among the base classes.

    A layer of the base model becomes one of these by `from_layer`: it keeps its weights, buffers and hooks.

    A model family defines `vertical_attention_class`, `pre_norm`, `compute_query_key` and `forward_with_attention`
    (see `hf_tokenmixup.saliency.SupportsAttentionSaliency`).
    """

    # Class of the attention of vertical layers, a subclass of the base layer's. It takes the keyword `memory`,
    # normalized tokens (B, M, D). If the family defines `input_projection`, layers that mix or provide tokens have it
    # too, and `base_forward` takes its output as `attn_output`. It then takes the keywords `projected` and `received`
    # and has the method `computes_map` (see `VerticalCctAttention`).
    vertical_attention_class: type[nn.Module]

    # transformers checkpoints a complete layer: it wraps `forward` in `__init_subclass__` or in `__call__`, depending
    # on the version. Mixing must not run twice, so this class checkpoints the base layer only.
    __call__ = nn.Module.__call__

    def __init_subclass__(cls, **kwargs):
        pass

    @classmethod
    def from_layer(cls, layer: nn.Module, config: TokenMixupConfigMixin, layer_index: int) -> "TokenMixupLayerMixin":
        """Convert a layer of the base model, in place.

        Args:
            layer: layer of the base class.
            config: model configuration.
            layer_index: index of the layer, from 0.

        Returns:
            The same layer, with this class.
        """
        classes = {name: type(module) for name, module in layer.named_modules()}
        attributes = dict(vars(layer))
        known = {*attributes, *dict(layer.named_children())}
        layer.__class__ = cls
        try:
            layer.init_tokenmixup(config, layer_index)
        finally:
            # After an error, `to_plain_layer` undoes what was done until then.
            vars(layer)[_PLAIN_LAYER] = PlainLayer(
                {name: classes[name] for name in classes if type(layer.get_submodule(name)) is not classes[name]},
                {name: value for name, value in attributes.items() if vars(layer)[name] is not value},
                [name for name in (*vars(layer), *dict(layer.named_children())) if name not in known],
            )
        return layer

    def to_plain_layer(self) -> nn.Module:
        """Undo `from_layer`, in place.

        Returns:
            The same layer, with the class of the base model.
        """
        plain = vars(self).pop(_PLAIN_LAYER)
        for name in plain.added:
            delattr(self, name)
        vars(self).update(plain.attributes)
        for name, module_class in plain.classes.items():
            self.get_submodule(name).__class__ = module_class
        return self

    def init_tokenmixup(self, config: TokenMixupConfigMixin, layer_index: int) -> None:
        """Initialize TokenMixup in a layer that has its weights. The weights of ScoreNet are not initialized.

        Args:
            config: model configuration.
            layer_index: index of the layer, from 0.
        """
        self.config = config
        self.layer_index = layer_index
        self.is_horizontal = layer_index in config.horizontal_layers
        self.is_vertical = layer_index in config.vertical_layers
        self.feeds_vertical_memory = layer_index < config.num_collected_layers
        # An attention of another class has a forward pass of its own. Only vertical layers must replace it.
        is_base_attention = type(self.attention_module) is self.vertical_attention_class.__base__
        detects = self.is_horizontal or self.feeds_vertical_memory
        if self.is_vertical or (detects and is_base_attention and self.input_projection is not None):
            self.attention_module.__class__ = self.vertical_attention_class
        if self.is_horizontal:
            # On the meta device it draws no random numbers, so that a seed initializes the weights of the base model.
            with torch.device("meta"):
                scorenet = ScoreNet(
                    config.network.hidden_size,
                    config.num_labels,
                    pooling=config.effective_scorenet_pooling,
                    num_prefix_tokens=config.num_prefix_tokens,
                )
            weight = next(parameter for parameter in self.parameters() if parameter.is_floating_point())
            self.scorenet = scorenet.to_empty(device=weight.device).to(weight.dtype).train(self.training)

    @property
    def attention_module(self) -> nn.Module:
        """The self-attention of the layer."""
        return self.attention

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        tokenmixup: TokenMixupContext | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Apply TokenMixup, then the base layer.

        Args:
            hidden_states: (B, N, D) tokens.
            attention_mask: as in the base layer.
            tokenmixup: context of the forward pass; None applies the base layer only.
            kwargs: keyword arguments of the base layer.

        Returns:
            (B, N, D) tokens.
        """
        memory = None
        if tokenmixup is not None:
            layer_kwargs = {"attention_mask": attention_mask, **kwargs}
            hidden_states, memory, attn_output = self.apply_tokenmixup(hidden_states, tokenmixup, layer_kwargs)
            if attn_output is not None:
                kwargs = {"attn_output": attn_output}
        if memory is not None:
            # This layer may have appended its own tokens.
            num_tokens = memory.shape[1]
            kwargs = self.add_memory_positions(kwargs, lambda: tokenmixup.memory.positions()[:, :num_tokens])
        if not (self.gradient_checkpointing and self.training):
            return self.base_forward(hidden_states, attention_mask, memory, **kwargs)

        # All tensors are arguments: reentrant checkpointing would backpropagate through others once for each layer.
        def layer(hidden_states, attention_mask, memory, *values):
            return self.base_forward(hidden_states, attention_mask, memory, **dict(zip(kwargs, values, strict=True)))

        return checkpoint_layer(
            self._gradient_checkpointing_func, layer, hidden_states, attention_mask, memory, *kwargs.values()
        )

    @property
    def input_projection(self) -> nn.Linear | None:
        """Linear layer without bias for queries, keys and values at once, which can serve saliency and attention.

        The attention of a family that has one takes its values (B, N, 3 * D) as `projected`, and so does its
        `compute_query_key`. None if each of them projects the input.
        """
        return None

    def project_input(self, hidden: torch.Tensor) -> ProjectedInput | None:
        """Project the input of a layer once, for the saliency of its tokens and for its attention.

        Args:
            hidden: (B, N, D) input of the layer.

        Returns:
            The normalized tokens and the values of `input_projection`. None if saliency and attention must project
            separately: the CLS query needs no keys, autocast would change the saliency, and hooks, adapters and other
            classes change the projection or the attention.
        """
        projection, attention = self.input_projection, self.attention_module
        if (
            projection is None
            or not has_plain_weight(projection)
            or projection.bias is not None
            or type(attention) is not self.vertical_attention_class
            or has_backward_hooks(projection)
            or has_backward_hooks(attention)
            or attention._forward_pre_hooks
            or "forward" in vars(attention)
            or self.config.effective_saliency_query == "cls"
            or torch.is_autocast_enabled(hidden.device.type)
        ):
            return None
        normed = self.pre_norm(hidden)
        return ProjectedInput(normed, projection(normed))

    def add_memory_positions(
        self, layer_kwargs: Mapping[str, Any], positions_fn: Callable[[], torch.Tensor]
    ) -> Mapping[str, Any]:
        """Add the positions of the memory to keyword arguments that have one position for each token.

        Args:
            layer_kwargs: keyword arguments of the base layer.
            positions_fn: returns the patch slots (B, M) from which the tokens of the memory come.

        Returns:
            The keyword arguments of a layer with a memory; unchanged if no argument depends on positions.
        """
        return layer_kwargs

    def apply_pre_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalize the layer's input (B, N, D) for attention, in the dtype of the weights."""
        return self.pre_norm(hidden.to(self.pre_norm.weight.dtype))

    def attention_weights(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """See `hf_tokenmixup.saliency.SupportsAttentionSaliency`."""
        query, key, scale, bias = self.compute_query_key(hidden, cls_query_only=False, **kwargs)
        return eager_attention_forward(self.attention_module, query, key, key, bias, scaling=scale)[1]

    def base_forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, memory: torch.Tensor | None, **kwargs
    ) -> torch.Tensor:
        """Apply the base layer. A memory (B, M, D) adds M keys and values to its attention."""
        if memory is not None:
            kwargs["memory"] = self.pre_norm(memory)
        return super().forward(hidden_states, attention_mask, **kwargs)

    def apply_tokenmixup(
        self, hidden_states: torch.Tensor, context: TokenMixupContext, layer_kwargs: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Apply manifold mixup and HTM, then read from and append to the memory of VTM.

        A layer whose input is projected once applies its attention here, see `project_input`.

        Args:
            hidden_states: (B, N, D) tokens.
            context: context of the forward pass; it is updated in place.
            layer_kwargs: arguments of the base layer that its attention may depend on.

        Returns:
            (B, N, D) tokens; the memory (B, M, D) of a vertical layer, None in other layers; and the output (B, N, D)
            of the attention, None if it was not applied.
        """
        if context.manifold is not None and self.layer_index in self.config.manifold_mixup_layers:
            hidden_states = self._apply_manifold_mixup(hidden_states, context)
        memory = context.memory.tokens() if self.is_vertical and context.memory.num_tokens else None
        # With checkpointing, the layer computes its projection again in the backward pass.
        project_once = (
            memory is None and self.config.saliency_detector == "attention" and not self.gradient_checkpointing
        )
        projected = None
        if self.is_horizontal:
            hidden_states, projected = self._apply_horizontal_mixup(hidden_states, context, layer_kwargs, project_once)
        attn_output = None
        if self.feeds_vertical_memory and context.memory.kappa:
            if projected is None and project_once:
                projected = self.project_input(hidden_states)
            if projected is not None and self._detects_in_attention(projected, **layer_kwargs):
                received: list[torch.Tensor] = []
                attn_output, _ = self.attention_module(projected.normed, projected=projected.values, received=received)
                saliency = received[0][:, self.config.num_prefix_tokens :]
            else:
                values = {} if projected is None else {"projected": projected.values.detach()}
                saliency = self._detect_saliency(
                    (self,), context, hidden_states.detach(), layer_kwargs={**layer_kwargs, **values}
                )
            hidden_states = context.memory.collect(hidden_states, saliency)
        if projected is not None and attn_output is None:
            attn_output, _ = self.attention_module(projected.normed, projected=projected.values, **layer_kwargs)
        return hidden_states, memory, attn_output

    def _detects_in_attention(
        self, projected: ProjectedInput, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> bool:
        """Whether saliency is read from the map that the attention computes, without arguments that change the map."""
        return (
            self.config.saliency_route == "auto"
            and attention_mask is None
            and kwargs.keys() <= _OUTPUT_FLAGS
            and self.attention_module.computes_map(projected.values)
        )

    def _apply_horizontal_mixup(
        self,
        hidden_states: torch.Tensor,
        context: TokenMixupContext,
        layer_kwargs: Mapping[str, Any],
        project_once: bool,
    ) -> tuple[torch.Tensor, ProjectedInput | None]:
        """Apply HTM. With `project_once`, return the projection of the mixed tokens too, see `project_input`.

        Normalization and projection treat each token alone, so mixing the projections replaces projecting again.
        """
        projected = None
        if project_once and not self.config.rollout_steps:
            with torch.no_grad():
                projected = self.project_input(hidden_states)
            if projected is not None:
                layer_kwargs = {**layer_kwargs, "projected": projected.values}
        rollout_layers = context.layers[self.layer_index : self.layer_index + self.config.rollout_steps + 1]
        saliency_fn = partial(self._detect_saliency, rollout_layers, context, layer_kwargs=layer_kwargs)
        hidden_states, context.targets, loss, record = apply_horizontal_mixup(
            self.scorenet, hidden_states, context.targets, saliency_fn, self.config, context.labels
        )
        context.labels = None
        context.scorenet_losses.append(loss)
        context.horizontal_records.append(record)
        if context.saliency is not None:
            context.saliency = torch.where(record.replaced, record.saliency[record.partner], record.saliency)
        if projected is not None:
            normed, values = self.pre_norm(hidden_states), gather_rows(projected.values, record.rows)
            projected = ProjectedInput(normed, KnownProjection.apply(normed, self.input_projection.weight, values))
        return hidden_states, projected

    def _apply_manifold_mixup(self, hidden_states: torch.Tensor, context: TokenMixupContext) -> torch.Tensor:
        position, lam, partner = context.manifold
        is_selected_layer = position == self.config.manifold_mixup_layers.index(self.layer_index)
        mixed, targets = manifold_mix(hidden_states, context.targets, partner, lam)
        context.targets = torch.where(is_selected_layer, targets, context.targets)
        context.labels = None
        if context.saliency is not None:
            mixed_saliency = mix_with_partner(context.saliency, partner, lam)
            context.saliency = torch.where(is_selected_layer, mixed_saliency, context.saliency)
        return torch.where(is_selected_layer, mixed, hidden_states)

    def _detect_saliency(
        self,
        layers: Sequence["TokenMixupLayerMixin"],
        context: TokenMixupContext,
        hidden_states: torch.Tensor,
        layer_kwargs: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        return detect_saliency(
            self.config, layers, hidden_states, gradient_fn=lambda: context.saliency, layer_kwargs=layer_kwargs
        )


def detect_saliency(
    config: TokenMixupConfigMixin,
    layers: Sequence[TokenMixupLayerMixin],
    hidden: torch.Tensor,
    *,
    gradient_fn: Callable[[], torch.Tensor],
    generator: torch.Generator | None = None,
    layer_kwargs: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """Saliency of the input tokens of a layer by the detector that the configuration selects.

    Args:
        config: model configuration.
        layers: the layer, followed by the additional layers of the attention rollout.
        hidden: (B, N, D) input of the first layer, without gradient.
        gradient_fn: returns the saliency (B, T) of the gradient detector, see `hf_tokenmixup.saliency`.
        generator: random number generator of the random detector; None uses torch's default generator.
        layer_kwargs: arguments of the layers that their attention depends on.

    Returns:
        (B, T) saliency.
    """
    if config.saliency_detector == "gradient":
        return gradient_fn()
    if config.saliency_detector == "random":
        batch, num_tokens, _ = hidden.shape
        return random_saliency(batch, num_tokens - config.num_prefix_tokens, hidden.device, generator)
    for layer in layers[1:]:
        unshard(layer)
    # The layers' own methods skip their dropout, but adapters of peft have a dropout of their own.
    with eval_mode(*(adapter for layer in layers for adapter in find_adapter_layers(layer))):
        return attention_saliency(
            layers,
            hidden,
            config.num_prefix_tokens,
            config.effective_saliency_query,
            config.saliency_route,
            layer_kwargs,
        )


def has_plain_weight(projection: nn.Module) -> bool:
    """Whether a projection is a linear layer without adapters, hooks, a patched forward pass or other wrappers."""
    hooks = projection._forward_hooks or projection._forward_pre_hooks
    return type(projection) is nn.Linear and not hooks and "forward" not in vars(projection)


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether gradients of a module's inputs or outputs are read or changed."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def unshard(module: nn.Module) -> None:
    """Gather the weights of an FSDP2 module outside of its forward pass. Other modules are unchanged."""
    if isinstance(module, FSDPModule):
        module.unshard()
