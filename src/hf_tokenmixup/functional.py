"""The equations of TokenMixup as pure functions (paper: section 3, Algorithm 1).

Nothing here knows a model: tensors go in, tensors come out, on any device and in any floating dtype. Saliency
mathematics runs in float32 or wider whatever comes in. Shapes: B images, N tokens in a sequence of which the first P
are prefix tokens (CLS, registers), T = N - P patch tokens, D hidden size, H heads, C classes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

ASSIGNMENTS = ("optimal", "random")
TOKEN_SELECTIONS = ("saliency", "random")
RELABELS = ("saliency", "count")
SALIENCY_QUERIES = ("cls", "mean")

# A CUDA graph cannot contain a copy to the CPU. A compiler that knows the tag splits the graph at the operator.
NOT_CAPTURED: dict[str, Any] = {"tags": [torch.Tag.cudagraph_unsafe]} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


class HorizontalMix(NamedTuple):
    """What :func:`horizontal_mix` returns.

    Attributes:
        hidden: (B, N, D) tokens after mixing.
        targets: (B, C) class distributions after mixing.
        partner: (B,) int64, the image that tokens were offered from; itself where nothing was to be mixed.
        replaced: (B, T) bool, True where a patch token was replaced by the partner's.
    """

    hidden: torch.Tensor
    targets: torch.Tensor
    partner: torch.Tensor
    replaced: torch.Tensor


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise a ``ValueError`` that names the setting, the value and the choices unless ``value`` is one of them."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself in float32 or float64, a float32 copy of it in any narrower dtype."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def source(generator: torch.Generator | None) -> dict[str, Any]:
    """The generator as a keyword, left out if None: with one of None, ``torch.compile`` draws no varying number."""
    return {} if generator is None else {"generator": generator}


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each image against a class distribution, in nats.

    Args:
        logits: (B, C) class scores.
        targets: (B, C) class distributions.

    Returns:
        (B,) in float32 or wider.
    """
    logits = at_least_float32(logits)
    return F.cross_entropy(logits, targets.to(logits.dtype), reduction="none")


def difficulty(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Difficulty of each image, Eq. (1): cross-entropy of ScoreNet's prediction, in nats.

    Args:
        logits: (B, C) ScoreNet's class scores.
        targets: (B, C) class distributions.

    Returns:
        (B,) difficulties in float32 or wider.
    """
    return soft_cross_entropy(logits, targets)


def attention_rollout(attentions: Sequence[torch.Tensor]) -> torch.Tensor:
    """Attention rollout, Eq. (2): the product of head-averaged attention maps.

    Args:
        attentions: (B, H, N, N) maps of consecutive layers, the layer that is mixed first. Later layers multiply
            from the left, so that columns go on indexing the tokens of the first one.

    Returns:
        (B, N, N) rollout; rows are queries, columns the tokens that receive attention.

    Raises:
        ValueError: if no map is given.
    """
    if len(attentions) == 0:
        raise ValueError("attention_rollout needs at least one attention map (B, H, N, N), got none.")
    rollout = at_least_float32(attentions[0]).mean(dim=1)
    with torch.autocast(rollout.device.type, enabled=False):
        for attention in attentions[1:]:
            rollout = at_least_float32(attention).mean(dim=1) @ rollout
    return rollout


def token_saliency(rollout: torch.Tensor, num_prefix_tokens: int, query: str = "cls") -> torch.Tensor:
    """Saliency of the patch tokens, Eq. (3): the attention that each of them receives.

    Args:
        rollout: (B, N, N) attention, rows are queries.
        num_prefix_tokens: P, how many leading tokens carry no saliency.
        query: ``"cls"`` reads the first row, which the classifier reads too; ``"mean"`` averages over all rows.

    Returns:
        (B, T) saliency (an attention probability, no unit).

    Raises:
        ValueError: for another ``query``, or for ``"cls"`` in a sequence without prefix token.
    """
    check_choice("query", query, SALIENCY_QUERIES)
    rollout = at_least_float32(rollout)
    if query == "cls":
        if num_prefix_tokens < 1:
            raise ValueError("query='cls' needs a CLS token, but num_prefix_tokens is 0: use query='mean'.")
        received = rollout[:, 0]
    else:
        received = rollout.mean(dim=1)
    return received[:, num_prefix_tokens:]


def saliency_gain(saliency: torch.Tensor, rho: float) -> torch.Tensor:
    """Gain matrix, Eq. (6): C_ij = sum_t max(S_j,t - S_i,t - rho, 0).

    Computed as (sum |d| + sum d) / 2 with an L1 distance matrix, so that no (B, B, T) tensor exists, and accumulated
    in float64 (float32 where the device has no float64). An image whose saliency is not finite gains nothing and
    gives nothing.

    Args:
        saliency: (B, T).
        rho: least gain of a token that is worth replacing, >= 0; infinity gives a gain of zero everywhere.

    Returns:
        (B, B) gain; row i receives tokens from column j.
    """
    if saliency.numel() == 0:
        return saliency.new_zeros(len(saliency), len(saliency))
    finite = saliency.isfinite().all(dim=1)
    saliency = torch.where(finite[:, None], saliency, 0.0)
    saliency = saliency.to(torch.float32 if saliency.device.type == "mps" else torch.float64)
    # Above the largest possible difference every rho gives zero; capping it keeps the sums free of cancellation.
    threshold = (saliency.amax() - saliency.amin()).clamp(max=rho)
    total = saliency.sum(dim=1)
    absolute = torch.cdist(saliency + threshold, saliency, p=1)
    signed = total[None, :] - total[:, None] - threshold * saliency.shape[1]
    gain = (0.5 * (absolute + signed)).clamp(min=0.0)
    return torch.where(finite[:, None] & finite[None, :], gain, 0.0)


@torch.library.custom_op("hf_tokenmixup::optimal_assignment", mutates_args=(), **NOT_CAPTURED)
def _optimal_assignment(gain: torch.Tensor, easy: torch.Tensor, group_size: int | None) -> torch.Tensor:
    # One tensor holds both, so that one copy brings both to the host.
    packed = torch.cat([gain, easy[:, None].to(gain.dtype)], dim=1).cpu()
    score, easy_rows = packed[:, :-1].nan_to_num(nan=0.0), packed[:, -1].bool()
    partner = torch.arange(len(packed))
    num_groups = -(-len(packed) // group_size) if group_size else 1
    for group in partner.clone().tensor_split(max(1, num_groups)):
        rows = group[easy_rows[group]]
        if len(rows):
            _, columns = linear_sum_assignment(score[rows][:, group].numpy(), maximize=True)
            partner[rows] = group[torch.from_numpy(columns)]
    return partner.to(gain.device)


@_optimal_assignment.register_fake
def _(gain: torch.Tensor, easy: torch.Tensor, group_size: int | None) -> torch.Tensor:
    return gain.new_empty(gain.shape[0], dtype=torch.int64)


def optimal_assignment(gain: torch.Tensor, easy: torch.Tensor, group_size: int | None = None) -> torch.Tensor:
    """Partners by exact maximum matching, Eq. (7): every easy image gets one of its own among all B images.

    The one place where the host is waited for: gains go there, partners come back.

    Args:
        gain: (B, B), row i receives from column j.
        easy: (B,) bool, the rows to match.
        group_size: match within groups of at most so many neighbours of the batch, which takes far less time for
            large batches and gives some gain away. None: among all.

    Returns:
        (B,) int64 partner; an image that is not easy has itself.

    Raises:
        ValueError: for a group size below 1.
    """
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size must be at least 1, or None for the whole batch; got {group_size}.")
    return _optimal_assignment(gain.detach(), easy, group_size)


def random_assignment(easy: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Random partners of their own for the easy images (ablation of Eq. (7), Table 4).

    Args:
        easy: (B,) bool.
        generator: source of randomness, torch's default one if None.

    Returns:
        (B,) int64 partner; an image that is not easy has itself.
    """
    identity = torch.arange(len(easy), device=easy.device)
    return torch.where(easy, torch.randperm(len(easy), device=easy.device, **source(generator)), identity)


def replace_mask(saliency: torch.Tensor, partner: torch.Tensor, rho: float) -> torch.Tensor:
    """Which tokens are replaced, Eq. (9): S_j,t - S_i,t > rho with j the partner of i.

    Args:
        saliency: (B, T).
        partner: (B,) int64.
        rho: threshold, >= 0.

    Returns:
        (B, T) bool, True = replaced by the partner's token. Not-a-number compares as False.
    """
    saliency = at_least_float32(saliency)
    return saliency[partner] - saliency > rho


def random_replace_mask(replaced: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """As many replaced tokens in each row as in ``replaced`` (B, T), but drawn at random (ablation, Table 4)."""
    rank = torch.rand(replaced.shape, device=replaced.device, **source(generator)).argsort(dim=1).argsort(dim=1)
    return rank < replaced.sum(dim=1, keepdim=True)


def mix_tokens(
    hidden: torch.Tensor, partner: torch.Tensor, replaced: torch.Tensor, num_prefix_tokens: int
) -> torch.Tensor:
    """Hard replacement of tokens, Eq. (10).

    Tokens are selected and never multiplied by a mask: a non-finite token reaches only who took it.

    Args:
        hidden: (B, N, D).
        partner: (B,) int64.
        replaced: (B, T) bool.
        num_prefix_tokens: P; prefix tokens are never replaced.

    Returns:
        (B, N, D); gradients flow through kept and through copied tokens.
    """
    replaced = F.pad(replaced, (num_prefix_tokens, 0), value=False)
    own = torch.arange(len(hidden), device=hidden.device)
    image = torch.where(replaced, partner[:, None], own[:, None])
    return gather_tokens(hidden, image, torch.arange(hidden.shape[1], device=hidden.device))


def mix_targets(
    targets: torch.Tensor, saliency: torch.Tensor, partner: torch.Tensor, replaced: torch.Tensor
) -> torch.Tensor:
    """New class distributions by retained and received saliency, Eq. (11).

    Args:
        targets: (B, C).
        saliency: (B, T); ones count tokens instead.
        partner: (B,) int64.
        replaced: (B, T) bool.

    Returns:
        (B, C) in float32 or wider. A row without replaced tokens, or whose ratio is 0/0 or not finite, stays as it
        was.
    """
    targets, saliency = at_least_float32(targets), at_least_float32(saliency)
    own = torch.where(replaced, 0.0, saliency).sum(dim=1, keepdim=True)
    received = torch.where(replaced, saliency[partner], 0.0).sum(dim=1, keepdim=True)
    total = own + received
    mixed = (own / total).to(targets.dtype) * targets + (received / total).to(targets.dtype) * targets[partner]
    changed = replaced.any(dim=1, keepdim=True) & total.isfinite() & (total > 0)
    return torch.where(changed, mixed, targets)


def horizontal_mix(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    saliency: torch.Tensor,
    easy: torch.Tensor,
    rho: float,
    num_prefix_tokens: int,
    *,
    assignment: str = "optimal",
    group_size: int | None = None,
    token_selection: str = "saliency",
    relabel: str = "saliency",
    generator: torch.Generator | None = None,
) -> HorizontalMix:
    """Horizontal TokenMixup, Algorithm 1 from line 4 on. Every image keeps its place in the batch.

    Args:
        hidden: (B, N, D) tokens.
        targets: (B, C) class distributions.
        saliency: (B, T) saliency of the patch tokens.
        easy: (B,) bool, the images to mix.
        rho: least gain in saliency of a replaced token.
        num_prefix_tokens: P.
        assignment: ``"optimal"`` or ``"random"`` partners (Table 4).
        group_size: of the optimal assignment, see :func:`optimal_assignment`.
        token_selection: ``"saliency"``, or ``"random"`` for as many tokens drawn at random (Table 4).
        relabel: ``"saliency"``, or ``"count"`` for labels by the number of tokens (Table 4).
        generator: source of randomness of the random choices, torch's default one if None.

    Raises:
        ValueError: for an unknown choice, a negative or undefined rho, or a saliency of another shape than the
            patch tokens.
    """
    check_choice("assignment", assignment, ASSIGNMENTS)
    check_choice("token_selection", token_selection, TOKEN_SELECTIONS)
    check_choice("relabel", relabel, RELABELS)
    if not rho >= 0:
        raise ValueError(f"rho must be at least 0, got {rho}.")
    _check_saliency_shape(hidden, saliency, num_prefix_tokens)
    with torch.no_grad():
        saliency = at_least_float32(saliency)
        if assignment == "optimal":
            partner = optimal_assignment(saliency_gain(saliency, rho), easy, group_size)
        else:
            partner = random_assignment(easy, generator)
        replaced = replace_mask(saliency, partner, rho)
        if token_selection == "random":
            replaced = random_replace_mask(replaced, generator)
        weight = saliency if relabel == "saliency" else torch.ones_like(saliency)
    return HorizontalMix(
        hidden=mix_tokens(hidden, partner, replaced, num_prefix_tokens),
        targets=mix_targets(targets, weight, partner, replaced),
        partner=partner,
        replaced=replaced,
    )


def select_salient_tokens(
    hidden: torch.Tensor, saliency: torch.Tensor, kappa: int, num_prefix_tokens: int
) -> torch.Tensor:
    """The kappa most salient patch tokens of each image (section 3.4).

    Args:
        hidden: (B, N, D) tokens.
        saliency: (B, T).
        kappa: how many, 0 <= kappa <= T.
        num_prefix_tokens: P; prefix tokens are never selected.

    Returns:
        (B, kappa, D), most salient first.

    Raises:
        ValueError: if kappa is out of range, or the saliency of another shape than the patch tokens.
    """
    _check_saliency_shape(hidden, saliency, num_prefix_tokens)
    if not 0 <= kappa <= saliency.shape[1]:
        raise ValueError(f"kappa must lie between 0 and the number of patch tokens, {saliency.shape[1]}, got {kappa}.")
    image = torch.arange(len(hidden), device=hidden.device)
    return gather_tokens(hidden, image[:, None], saliency.topk(kappa, dim=1).indices + num_prefix_tokens)


def manifold_mix(
    hidden: torch.Tensor, targets: torch.Tensor, partner: torch.Tensor, share: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Manifold mixup (Verma et al., ICML 2019): every image and its label, blended with another's in one proportion.

    Args:
        hidden: (B, N, D) tokens.
        targets: (B, C) class distributions.
        partner: (B,) int64, a permutation.
        share: what is kept of each image, in [0, 1]; a number, or a tensor () on the device.

    Returns:
        (B, N, D) tokens and (B, C) targets.
    """
    return blend(hidden, partner, share), blend(targets, partner, share)


def blend(tensor: torch.Tensor, partner: torch.Tensor, share: float | torch.Tensor) -> torch.Tensor:
    """A share of each row of a tensor (B, ...) and the rest of its partner's, rounded once in half precision."""
    wide = at_least_float32(tensor)
    if torch.is_tensor(share):
        share = share.to(wide.dtype)
    return torch.lerp(wide[partner], wide, share).to(tensor.dtype)


def gather_tokens(hidden: torch.Tensor, image: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """(B, M, D): of (B, N, D) the tokens with these numbers, of these images; the two broadcast to (B, M)."""
    rows = image * hidden.shape[1] + token
    # Whole rows are copied, back too: several times as fast as `gather` or `where` on every element.
    return hidden.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def _check_saliency_shape(hidden: torch.Tensor, saliency: torch.Tensor, num_prefix_tokens: int) -> None:
    expected = (hidden.shape[0], hidden.shape[1] - num_prefix_tokens)
    if tuple(saliency.shape) != expected:
        raise ValueError(
            f"saliency must have one value for each patch token, shape (B, N - num_prefix_tokens) = {expected}, "
            f"got {tuple(saliency.shape)}."
        )
