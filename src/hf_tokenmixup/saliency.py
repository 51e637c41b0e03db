"""Saliency detectors: attention (paper: section 3.2, Eq. (2) and (3)), gradient and random (section 5.1, Table 3).

There are two routes to the attention saliency, with the same values. The general route multiplies the complete
attention maps of several layers. The fast route is for a single layer: it computes only the query rows that are needed
and limits the number of map elements in memory. Both are independent of the model's attention implementation.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from .functional import attention_rollout, generator_kwargs, soft_cross_entropy, token_saliency, upcast_to_float32

SALIENCY_DETECTORS = ("attention", "gradient", "random")
MAX_ATTENTION_MAP_ELEMENTS = 2**24  # 64 MiB in float32
CACHED_ATTENTION_MAP_ELEMENTS = 2**19  # 2 MiB in float32, which fit in the cache of a CPU


class QueryKey(NamedTuple):
    """Queries and keys of an attention layer. The attention scores are `scale * query @ key.mT + bias`.

    The scores may differ from those of the layer by a constant per query, which the softmax removes.

    Attributes:
        query: (B, H, Q, d), or (B, H, Q, D) if all heads share the keys (see `project_queries_to_inputs`).
        key: (B, H, N, d), or (B, 1, N, D) if all heads share the keys.
        scale: factor of the products.
        bias: additive term such as relative positions, broadcast to (B, H, Q, N); None: no term.
    """

    query: torch.Tensor
    key: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None


class SupportsAttentionSaliency(Protocol):
    """Methods of a transformer layer that the attention detector calls.

    The methods apply no dropout, in training mode too. `kwargs` are arguments of the layer that its attention depends
    on, such as rotary embeddings or an `attention_mask` with relative positions.
    """

    def compute_query_key(
        self, hidden: torch.Tensor, cls_query_only: bool, memory: torch.Tensor | None = None, **kwargs: Any
    ) -> QueryKey:
        """Compute queries and keys.

        Args:
            hidden: (B, N, D) input of the layer.
            cls_query_only: compute the query of the first token only (Q = 1) instead of all queries (Q = N).
            memory: (B, M, D) tokens of earlier layers, which follow the keys as in vertical layers; None: no tokens.
            kwargs: arguments of the layer.
        """

    def attention_weights(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Compute the attention probabilities (B, H, N, N) that `output_attentions=True` returns.

        Args:
            hidden: (B, N, D) input of the layer.
            kwargs: arguments of the layer.
        """

    def forward_with_attention(self, hidden: torch.Tensor, attention: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Compute the output (B, N, D) of the layer from given attention probabilities.

        Args:
            hidden: (B, N, D) input of the layer.
            attention: (B, H, N, N) probabilities from `attention_weights`.
            kwargs: arguments of the layer.
        """


def received_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    max_elements: int | None = None,
) -> torch.Tensor:
    """Attention that each token receives, averaged over heads and queries.

    Args:
        query: (B, H, Q, d).
        key: (B, H, N, d), or (B, 1, N, d) if all heads share the keys.
        scale: factor of the dot products.
        bias: additive term of the scores, broadcast to (B, H, Q, N); None: no term.
        max_elements: maximum number of attention map elements in memory. At least one query is computed at a time.
            None: 2**24. For several queries on a CPU, the larger one of 2**19 and one map of a head for each thread,
            so that the maps fit in its cache, and at most 2**24.

    Returns:
        (B, N) attention in float32 or float64.
    """
    # A single query is one chunk, up to very large batches. For more queries the number of chunks depends on the batch
    # size, and each number would be a graph of its own.
    if torch.compiler.is_compiling() and query.shape[2] > 1:
        return _received_attention_op(query, key, scale, bias, max_elements)
    return _received_attention(query, key, scale, bias, max_elements)


def _received_attention(
    query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None, max_elements: int | None
) -> torch.Tensor:
    batch, heads, num_queries, _ = query.shape
    num_tokens = key.shape[2]
    if max_elements is None:
        max_elements = MAX_ATTENTION_MAP_ELEMENTS
        if num_queries > 1 and query.device.type == "cpu":
            one_per_thread = torch.get_num_threads() * num_queries * num_tokens
            max_elements = min(max_elements, max(CACHED_ATTENTION_MAP_ELEMENTS, one_per_thread))
    if bias is not None:
        bias = upcast_to_float32(bias).expand(batch, heads, num_queries, num_tokens)
    query, key = upcast_to_float32(query), upcast_to_float32(key).transpose(2, 3)
    if key.shape[1] < heads:
        # Treat the heads as queries of one head. A broadcast product would copy the keys for each head.
        query = query.flatten(1, 2)[:, None]
        bias = None if bias is None else bias.flatten(1, 2)[:, None]
    if batch * heads * num_queries * num_tokens <= max_elements:
        return _softmax_of_scores(query, key, scale, bias).mean(dim=(1, 2))
    by_head = num_queries > 1 and query.device.type == "cpu"
    heads_at_once, images, rows = _chunk_sizes(query, num_tokens, max_elements, by_head)
    queries, keys = query.split(images), key.split(images)
    biases = [None] * len(queries) if bias is None else bias.split(images)
    sums = [
        _sum_of_maps(chunk, chunk_key, scale, term, heads_at_once, rows)
        for chunk, chunk_key, term in zip(queries, keys, biases, strict=True)
    ]
    return torch.cat(sums) / (heads * num_queries)


def _chunk_sizes(query: torch.Tensor, num_tokens: int, max_elements: int, by_head: bool) -> tuple[int, int, int]:
    """Numbers of heads, images and queries whose maps are computed at a time.

    With `by_head`, one head of several images, if there is one for each thread: this product reads views of the
    heads, and that of several heads copies them. The number of images is a multiple of the number of threads, as some
    threads would wait otherwise.
    """
    batch, heads, num_queries, _ = query.shape
    if by_head:
        images, threads = max_elements // (num_queries * num_tokens), torch.get_num_threads()
        if min(images, batch) >= threads:
            return 1, images - images % threads, num_queries
    images, rows = max_elements // (heads * num_queries * num_tokens), max_elements // (heads * num_tokens)
    return heads, max(1, images), max(1, rows)


def _sum_of_maps(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    heads_at_once: int,
    rows: int,
) -> torch.Tensor:
    """Sum over heads and queries of the attention that each token of some images receives, (B, N)."""
    sums = []
    for first in range(0, query.shape[1], heads_at_once):
        heads = slice(first, first + heads_at_once)
        queries = query[:, heads].split(rows, dim=2)
        biases = [None] * len(queries) if bias is None else bias[:, heads].split(rows, dim=2)
        sums += [
            _softmax_of_scores(chunk, key[:, heads], scale, term).sum(dim=(1, 2))
            for chunk, term in zip(queries, biases, strict=True)
        ]
    return sum(sums[1:], sums[0])


def _softmax_of_scores(
    query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None
) -> torch.Tensor:
    # One operator multiplies and scales. With beta=0 it does not read its first argument.
    unread = torch.empty((), dtype=query.dtype, device=query.device)
    scores = torch.baddbmm(unread, query.flatten(0, 1), key.flatten(0, 1), beta=0, alpha=scale)
    scores = scores.unflatten(0, query.shape[:2])
    return (scores if bias is None else scores + bias).softmax(dim=-1)


_received_attention_op = torch.library.custom_op(
    "hf_tokenmixup::received_attention", _received_attention, mutates_args=()
)


@_received_attention_op.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None, max_elements: int | None
) -> torch.Tensor:
    return upcast_to_float32(query).new_empty((query.shape[0], key.shape[2]))


def project_queries_to_inputs(query: torch.Tensor, key_weight: torch.Tensor) -> torch.Tensor:
    """Multiply queries by the key projection, so that their keys are the inputs of the projection.

    q . (W_k x + b_k) equals (W_k^T q) . x + q . b_k. The second term is the same for all keys of a query, so the
    softmax removes it. With few queries this is faster than the projection of all N tokens.

    Args:
        query: (B, H, Q, d).
        key_weight: (H * d, D) weight of the key projection.

    Returns:
        (B, H, Q, D) queries in float32 or float64.
    """
    batch, heads, num_queries, _ = query.shape
    query = upcast_to_float32(query).transpose(0, 1).flatten(1, 2)  # (H, B * Q, d)
    projected = torch.bmm(query, upcast_to_float32(key_weight).unflatten(0, (heads, -1)))
    return projected.unflatten(1, (batch, num_queries)).transpose(0, 1)


def attention_saliency(
    layers: Sequence[SupportsAttentionSaliency],
    hidden: torch.Tensor,
    num_prefix_tokens: int,
    query: str = "cls",
    route: str = "auto",
    layer_kwargs: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """Saliency of the input tokens of a layer by attention, Eq. (2) and (3), without gradient.

    Autocast is disabled, so the saliency does not depend on the autocast dtype.

    Args:
        layers: the layer, followed by the additional layers of the attention rollout (none for a single step).
        hidden: (B, N, D) input of the first layer.
        num_prefix_tokens: P, the number of leading tokens that have no saliency.
        query: `"cls"` or `"mean"`, see `hf_tokenmixup.functional.token_saliency`.
        route: `"auto"` selects the fast route for a single layer, `"output_attentions"` always computes complete maps.
        layer_kwargs: arguments of the layers that their attention depends on.

    Returns:
        (B, T) saliency in float32 or float64.
    """
    kwargs = layer_kwargs or {}
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        if route == "auto" and len(layers) == 1:
            query_key = layers[0].compute_query_key(hidden, cls_query_only=query == "cls", **kwargs)
            return received_attention(*query_key)[:, num_prefix_tokens:]
        attentions = [layers[0].attention_weights(hidden, **kwargs)]
        for layer, following in pairwise(layers):
            hidden = layer.forward_with_attention(hidden, attentions[-1], **kwargs)
            attentions.append(following.attention_weights(hidden, **kwargs))
        return token_saliency(attention_rollout(attentions), num_prefix_tokens, query)


def gradient_saliency(
    logits_fn: Callable[[torch.Tensor], torch.Tensor],
    pixel_values: torch.Tensor,
    targets: torch.Tensor,
    grid: tuple[int, int],
) -> torch.Tensor:
    """Saliency by the gradient of the loss with respect to the pixels, as in Puzzle Mix and Co-Mixup.

    The saliency of a token is the mean over its pixels of the gradient's root mean square over channels. The loss is
    the mean cross-entropy. Autocast is disabled. No parameter receives a gradient, and no gradient hook is called.

    Args:
        logits_fn: differentiable function from (B, 3, H, W) to logits (B, C), in evaluation mode (see `eval_mode`).
        pixel_values: (B, 3, H, W) normalized images.
        targets: (B, C) class distributions.
        grid: rows and columns of patch tokens.

    Returns:
        (B, T) saliency in float32 or float64, row by row through the grid. Each image's saliency has a sum of 1; it is
        uniform if the gradient is zero.
    """
    with torch.enable_grad(), torch.autocast(pixel_values.device.type, enabled=False):
        pixels = pixel_values.detach().clone().requires_grad_(True)
        loss = soft_cross_entropy(logits_fn(pixels), targets).mean()
        (gradient,) = torch.autograd.grad(loss, pixels)
    gradient_rms = upcast_to_float32(gradient).square().mean(dim=1, keepdim=True).sqrt()  # (B, 1, H, W)
    saliency = F.adaptive_avg_pool2d(gradient_rms, grid).flatten(1)
    total = saliency.sum(dim=1, keepdim=True)
    return torch.where(total > 0, saliency / total, 1 / saliency.shape[1])


def random_saliency(
    batch: int, num_tokens: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> torch.Tensor:
    """Uniform random saliency, the baseline of Table 3.

    Args:
        batch: B.
        num_tokens: T.
        device: device of the saliency and of the generator.
        generator: random number generator; None uses torch's default generator.

    Returns:
        (B, T) saliency in float32. Each image's saliency has a sum of 1.
    """
    saliency = torch.rand(batch, num_tokens, device=device, **generator_kwargs(generator))
    return saliency / saliency.sum(dim=1, keepdim=True)


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode, and restore the mode of each module on exit.

    Args:
        models: the models, with all their modules.
    """
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
