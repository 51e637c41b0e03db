"""How a transformer layer calls the mixing steps, for every model family alike."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.models.vit.modeling_vit import eager_attention_forward

from ..configuration import TokenMixupConfigMixin
from ..functional import blend, manifold_mix
from ..horizontal import ScoreNet, apply_horizontal_mixup
from ..saliency import attention_saliency, eval_mode, random_saliency
from .gradient_checkpointing import checkpoint_layer
from .outputs import TokenMixupContext
from .peft_utils import find_adapter_layers


class TokenMixupLayerMixin(nn.Module):
    """Mixes in front of a transformer layer. Comes before the family's plain layer among the bases.

    The family gives ``pre_norm``, ``query_and_key`` and ``propagate`` (see
    :class:`~hf_tokenmixup.saliency.SupportsAttentionSaliency`), and its attention takes a keyword ``memory`` (B, M, D)
    of normed tokens in vertical layers.
    """

    # The host checkpoints a whole layer, by wrapping ``forward`` in ``__init_subclass__`` or in ``__call__`` (by
    # version). Mixing must not run a second time, so this class checkpoints the plain layer alone instead.
    __call__ = nn.Module.__call__

    def __init_subclass__(cls, **kwargs):
        pass

    def init_tokenmixup(self, config: TokenMixupConfigMixin, layer_index: int) -> None:
        """To be called at the end of the family's ``__init__``."""
        self.settings = config
        self.layer_index = layer_index
        self.is_horizontal = layer_index in config.horizontal_layers
        self.is_vertical = layer_index in config.vertical_layers
        self.is_collected = layer_index < config.num_collected_layers
        if self.is_horizontal:
            self.scorenet = ScoreNet(
                config.hidden_size,
                config.num_labels,
                pooling=config.scorenet_pooling,
                num_prefix_tokens=config.num_prefix_tokens,
            )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        tokenmixup: TokenMixupContext | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """(B, N, D) to (B, N, D): the plain layer, behind the mixing steps if a state comes along."""
        memory = None
        if tokenmixup is not None:
            hidden_states, memory = self.mix(hidden_states, tokenmixup)
        layer = partial(self.base_forward, **kwargs)
        if self.gradient_checkpointing and self.training:
            return checkpoint_layer(self._gradient_checkpointing_func, layer, hidden_states, attention_mask, memory)
        return layer(hidden_states, attention_mask, memory)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """What attention sees of the layer's input (B, N, D), in the dtype of the weights."""
        return self.pre_norm(hidden.to(self.pre_norm.weight.dtype))

    def attention_weights(self, hidden: torch.Tensor) -> torch.Tensor:
        """See :class:`~hf_tokenmixup.saliency.SupportsAttentionSaliency`."""
        query, key, scale = self.query_and_key(hidden, cls_query_only=False)
        return eager_attention_forward(self.attention, query, key, key, None, scaling=scale)[1]

    def base_forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, memory: torch.Tensor | None, **kwargs
    ) -> torch.Tensor:
        """The plain layer; with a memory (B, M, D), its attention has that many further keys and values."""
        if memory is not None:
            kwargs["memory"] = self.pre_norm(memory)
        return super().forward(hidden_states, attention_mask, **kwargs)

    def mix(self, hidden_states: torch.Tensor, state: TokenMixupContext) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The steps in front of the layer: horizontal first, then what vertical layers need of its input."""
        if state.manifold is not None and self.layer_index in self.settings.manifold_mixup_layers:
            hidden_states = self._apply_manifold_mixup(hidden_states, state)
        if self.is_horizontal:
            hidden_states = self._apply_horizontal_mixup(hidden_states, state)
        memory = state.memory.tokens() if self.is_vertical and state.memory.num_tokens else None
        if self.is_collected and state.memory.kappa:
            state.memory.collect(hidden_states, self._saliency((self,), state, hidden_states.detach()))
        return hidden_states, memory

    def _apply_horizontal_mixup(self, hidden_states: torch.Tensor, state: TokenMixupContext) -> torch.Tensor:
        settings, index = self.settings, self.layer_index
        hidden_states, state.targets, loss, step = apply_horizontal_mixup(
            self.scorenet,
            hidden_states,
            state.targets,
            partial(self._saliency, state.layers[index : index + settings.rollout_steps + 1], state),
            tau=settings.horizontal_tau,
            rho=settings.horizontal_rho,
            detach=settings.scorenet_detach,
            num_prefix_tokens=settings.num_prefix_tokens,
            assignment=settings.assignment,
            group_size=settings.assignment_group_size,
            token_selection=settings.token_selection,
            relabel=settings.relabel,
        )
        state.scorenet_losses.append(loss)
        state.steps.append(step)
        if state.saliency is not None:
            state.saliency = torch.where(step.replaced, step.saliency[step.partner], step.saliency)
        return hidden_states

    def _apply_manifold_mixup(self, hidden_states: torch.Tensor, state: TokenMixupContext) -> torch.Tensor:
        position, share, partner = state.manifold
        here = position == self.settings.manifold_mixup_layers.index(self.layer_index)
        mixed, targets = manifold_mix(hidden_states, state.targets, partner, share)
        state.targets = torch.where(here, targets, state.targets)
        if state.saliency is not None:
            state.saliency = torch.where(here, blend(state.saliency, partner, share), state.saliency)
        return torch.where(here, mixed, hidden_states)

    def _saliency(
        self, layers: Sequence["TokenMixupLayerMixin"], state: TokenMixupContext, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """(B, T) saliency of the tokens (B, N, D) that enter the first of ``layers``."""
        settings = self.settings
        if state.saliency is not None:
            return state.saliency
        if settings.saliency_detector == "random":
            batch, length, _ = hidden_states.shape
            return random_saliency(batch, length - settings.num_prefix_tokens, hidden_states.device)
        for layer in layers[1:]:
            unshard(layer)
        # A layer offers its own parts without their dropout; adapters that were put into it have another.
        with eval_mode(*(adapter for layer in layers for adapter in find_adapter_layers(layer))):
            return attention_saliency(
                layers, hidden_states, settings.num_prefix_tokens, settings.saliency_query, settings.saliency_route
            )


def has_plain_weight(projection: nn.Module) -> bool:
    """Whether a projection is its weight and bias alone, without an adapter, a hook or another wrapper."""
    return type(projection) is nn.Linear and not (projection._forward_hooks or projection._forward_pre_hooks)


def unshard(module: nn.Module) -> None:
    """Under FSDP2, put the weights of a module together outside of its forward, which then finds them so."""
    if isinstance(module, FSDPModule):
        module.unshard()
