"""Detectors of saliency: attention (paper: section 3.2, Eq. (2) and (3)), gradient and random (section 5.1, Table 3).

Attention: two routes lead to the same value. The general one asks layers for their whole attention maps and multiplies
them; the fast one, for a single layer, computes only the query rows that the saliency needs and never holds more of
the map than a bounded number of elements. Both leave the forward pass on whatever attention implementation the user
chose.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from .functional import at_least_float32, attention_rollout, soft_cross_entropy, source, token_saliency

SALIENCY_DETECTORS = ("attention", "gradient", "random")
MAX_ATTENTION_MAP_ELEMENTS = 2**24  # 64 MiB in float32


class SupportsAttentionSaliency(Protocol):
    """What a layer offers to the detector. All of it in evaluation mode: no dropout, whatever ``training`` says."""

    def query_and_key(self, hidden: torch.Tensor, cls_query_only: bool) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Queries, keys of the layer's input (B, N, D), and the scale of their product.

        Either (B, H, Q, d) and (B, H, N, d), or (B, H, Q, D) and (B, 1, N, D), keys that all heads share (see
        :func:`queries_of_inputs`). A term that is the same for all keys of a query may be missing from the product.
        """

    def attention_weights(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, H, N, N) probabilities, as ``output_attentions=True`` returns them."""

    def propagate(self, hidden: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """(B, N, D) output of the layer for its input and the attention weights just returned."""


def received_attention(
    query: torch.Tensor, key: torch.Tensor, scale: float, max_elements: int = MAX_ATTENTION_MAP_ELEMENTS
) -> torch.Tensor:
    """Attention that each token receives, averaged over heads and over the given queries.

    Args:
        query: (B, H, Q, d).
        key: (B, H, N, d), or (B, 1, N, d) for keys that all heads share.
        scale: factor on the dot products.
        max_elements: how many elements of the attention map may exist at a time (at least one query is computed).

    Returns:
        (B, N) in float32 or wider.
    """
    # One query is one chunk. More are cut by the size of the batch, and each number of chunks would be a graph.
    if torch.compiler.is_compiling() and query.shape[2] > 1:
        return _received_attention_op(query, key, scale, max_elements)
    return _received_attention(query, key, scale, max_elements)


def _received_attention(query: torch.Tensor, key: torch.Tensor, scale: float, max_elements: int) -> torch.Tensor:
    batch, heads, num_queries, _ = query.shape
    num_tokens = key.shape[2]
    query, key = at_least_float32(query) * scale, at_least_float32(key).transpose(2, 3)
    if key.shape[1] < heads:
        # Heads become queries of one head: a broadcast product would copy the keys for each of them.
        query = query.flatten(1, 2)[:, None]
    rows = max(1, max_elements // max(1, batch * query.shape[1] * num_tokens))
    chunks = [(chunk @ key).softmax(dim=-1).sum(dim=(1, 2)) for chunk in query.split(rows, dim=2)]
    return sum(chunks[1:], chunks[0]) / (heads * num_queries)


_received_attention_op = torch.library.custom_op(
    "hf_tokenmixup::received_attention", _received_attention, mutates_args=()
)


@_received_attention_op.register_fake
def _(query: torch.Tensor, key: torch.Tensor, scale: float, max_elements: int) -> torch.Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty((query.shape[0], key.shape[2]), dtype=dtype)


def queries_of_inputs(query: torch.Tensor, key_weight: torch.Tensor) -> torch.Tensor:
    """Queries whose products with a layer's normed inputs x are those with its keys, W_k x.

    q . (W_k x + b_k) is (W_k^T q) . x and a term q . b_k, which is the same for all keys and drops out of the softmax:
    a few queries need no projection of all N tokens.

    Args:
        query: (B, H, Q, d).
        key_weight: (H * d, D) weight of the key projection.

    Returns:
        (B, H, Q, D) in float32 or wider.
    """
    batch, heads, num_queries, _ = query.shape
    query = at_least_float32(query).transpose(0, 1).flatten(1, 2)  # (H, B * Q, d)
    projected = torch.bmm(query, at_least_float32(key_weight).unflatten(0, (heads, -1)))
    return projected.unflatten(1, (batch, num_queries)).transpose(0, 1)


def attention_saliency(
    layers: Sequence[SupportsAttentionSaliency],
    hidden: torch.Tensor,
    num_prefix_tokens: int,
    query: str = "cls",
    route: str = "auto",
) -> torch.Tensor:
    """Saliency of the tokens that enter the first of ``layers``, without gradient.

    Computed outside of autocast, so that it is the same whatever the autocast dtype.

    Args:
        layers: the layer whose input is looked at, then the l >= 0 layers that the rollout goes on through.
        hidden: (B, N, D) input of the first of them.
        num_prefix_tokens: P.
        query: ``"cls"`` or ``"mean"``, see :func:`~hf_tokenmixup.functional.token_saliency`.
        route: ``"auto"`` takes the fast route where it applies (l = 0), ``"output_attentions"`` never.

    Returns:
        (B, T) saliency in float32 or wider.
    """
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        if route == "auto" and len(layers) == 1:
            received = received_attention(*layers[0].query_and_key(hidden, cls_query_only=query == "cls"))
            return received[:, num_prefix_tokens:]
        attentions = [layers[0].attention_weights(hidden)]
        for layer, following in pairwise(layers):
            hidden = layer.propagate(hidden, attentions[-1])
            attentions.append(following.attention_weights(hidden))
        return token_saliency(attention_rollout(attentions), num_prefix_tokens, query)


def gradient_saliency(
    classify: Callable[[torch.Tensor], torch.Tensor],
    pixel_values: torch.Tensor,
    targets: torch.Tensor,
    grid: tuple[int, int],
) -> torch.Tensor:
    """Saliency by the gradient of the loss with respect to the input, as Co-Mixup and Puzzle Mix have it.

    The mean cross-entropy's gradient, the root of its squares' mean over channels, averaged over the pixels of each
    token. Computed outside of autocast. No parameter receives a gradient, and no hook that waits for one is called.

    Args:
        classify: (B, 3, H, W) to logits (B, C), differentiable; in evaluation mode, so that it draws nothing and keeps
            no statistics (see :func:`eval_mode`).
        pixel_values: (B, 3, H, W), normalised.
        targets: (B, C) class distributions.
        grid: rows and columns of patch tokens.

    Returns:
        (B, T) in float32 or wider, row by row, each image's with a sum of 1; even where the gradient vanishes.
    """
    with torch.enable_grad(), torch.autocast(pixel_values.device.type, enabled=False):
        pixels = pixel_values.detach().clone().requires_grad_(True)
        loss = soft_cross_entropy(classify(pixels), targets).mean()
        (gradient,) = torch.autograd.grad(loss, pixels)
    strength = at_least_float32(gradient).square().mean(dim=1, keepdim=True).sqrt()  # (B, 1, H, W)
    saliency = F.adaptive_avg_pool2d(strength, grid).flatten(1)
    total = saliency.sum(dim=1, keepdim=True)
    return torch.where(total > 0, saliency / total, 1 / saliency.shape[1])


def random_saliency(
    batch: int, num_tokens: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> torch.Tensor:
    """(B, T) uniform random numbers, each image's scaled to a sum of 1: the baseline of Table 3."""
    saliency = torch.rand(batch, num_tokens, device=device, **source(generator))
    return saliency / saliency.sum(dim=1, keepdim=True)


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each module's own mode again afterwards."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
