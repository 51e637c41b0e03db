"""The equations of TokenMixup as pure functions (paper: section 3, Algorithm 1).

The functions take and return tensors on any device and in any floating-point dtype. Saliency is computed in float32
or float64.

Shapes: B images; N tokens per image, of which the first P are prefix tokens (CLS, registers) and T = N - P are patch
tokens; D hidden size; H attention heads; C classes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

ASSIGNMENTS = ("optimal", "random")
TOKEN_SELECTIONS = ("saliency", "random")
RELABELS = ("saliency", "count")
SALIENCY_QUERIES = ("cls", "mean")

# From this fraction of easy images on, the matching of a padded, square matrix is faster (measured).
_MIN_PADDED_FRACTION = 0.85

# A CUDA graph cannot contain a copy to the CPU. Versions of torch that have the tag split the graph at the operator.
_CUDAGRAPH_UNSAFE: dict[str, Any] = (
    {"tags": [torch.Tag.cudagraph_unsafe]} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)


class HorizontalMix(NamedTuple):
    """Output of `horizontal_mix`.

    Attributes:
        hidden: (B, N, D) tokens after mixing.
        targets: (B, C) class distributions after mixing.
        partner: (B,) int64 index of each image's partner; an image that is not easy is its own partner.
        replaced: (B, T) bool, True where a patch token was replaced by the partner's token.
    """

    hidden: torch.Tensor
    targets: torch.Tensor
    partner: torch.Tensor
    replaced: torch.Tensor


class MixStatistics(NamedTuple):
    """Statistics of `horizontal_mix` per image.

    Attributes:
        partner_weight: (B,) weight of the partner's label, Eq. (11); 0 for an image that is not mixed.
        gain: (B,) saliency gain from the image's partner, Eq. (6).
        random_gain: (B,) expected saliency gain from a random image of the batch; 0 for an image that is not easy.
        is_easy: (B,) 1 for an easy image, 0 for others, in float32.
    """

    partner_weight: torch.Tensor
    gain: torch.Tensor
    random_gain: torch.Tensor
    is_easy: torch.Tensor


def validate_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise a `ValueError` unless `value` is one of the allowed values.

    Args:
        name: name of the setting, for the message.
        value: value of the setting.
        allowed: the allowed values.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def upcast_to_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return a float32 copy of a tensor in half precision, and the tensor itself in float32 or float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def generator_kwargs(generator: torch.Generator | None) -> dict[str, Any]:
    """Return the keyword arguments that pass a generator to a torch function; none if `generator` is None.

    With `generator=None` as a keyword, `torch.compile` draws the same number in every call.
    """
    return {} if generator is None else {"generator": generator}


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each image with its label, in nats.

    Args:
        logits: (B, C) class scores.
        targets: (B, C) class distributions, or (B,) int64 class indices, for which fewer operators are needed.

    Returns:
        (B,) cross-entropy in float32 or float64.

    Example:
        >>> soft_cross_entropy(torch.zeros(2, 4), torch.eye(4)[:2])
        tensor([1.3863, 1.3863])
    """
    logits = upcast_to_float32(logits)
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets, reduction="none")
    # The values of F.cross_entropy. Negated targets need no operator in backward.
    return (logits.log_softmax(dim=1) * -targets.to(logits.dtype)).sum(dim=1)


def difficulty(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Difficulty of each image, Eq. (1): cross-entropy of ScoreNet's prediction, in nats.

    Args:
        logits: (B, C) class scores of ScoreNet.
        targets: (B, C) class distributions, or (B,) int64 class indices.

    Returns:
        (B,) difficulty in float32 or float64.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
        >>> difficulty(logits, torch.eye(2)[[0, 0]])
        tensor([0.0181, 4.0181])
    """
    return soft_cross_entropy(logits, targets)


def attention_rollout(attentions: Sequence[torch.Tensor]) -> torch.Tensor:
    """Attention rollout, Eq. (2): the product of head-averaged attention maps.

    Args:
        attentions: (B, H, N, N) maps of consecutive layers. The first map belongs to the layer whose input is mixed.
            Later maps multiply from the left, so the columns always index the tokens of the first layer.

    Returns:
        (B, N, N) rollout in float32 or float64. Rows are queries, columns are the tokens that receive attention.

    Raises:
        ValueError: if `attentions` is empty.

    Example:
        >>> uniform = torch.full((1, 2, 3, 3), 1 / 3)
        >>> attention_rollout([uniform, uniform])
        tensor([[[0.3333, 0.3333, 0.3333],
                 [0.3333, 0.3333, 0.3333],
                 [0.3333, 0.3333, 0.3333]]])
    """
    if len(attentions) == 0:
        raise ValueError("attention_rollout needs at least one attention map (B, H, N, N), got none.")
    rollout = upcast_to_float32(attentions[0]).mean(dim=1)
    with torch.autocast(rollout.device.type, enabled=False):
        for attention in attentions[1:]:
            rollout = upcast_to_float32(attention).mean(dim=1) @ rollout
    return rollout


def token_saliency(rollout: torch.Tensor, num_prefix_tokens: int, query: str = "cls") -> torch.Tensor:
    """Saliency of the patch tokens, Eq. (3): the attention that each of them receives.

    Args:
        rollout: (B, N, N) attention; rows are queries.
        num_prefix_tokens: P, the number of leading tokens that have no saliency.
        query: `"cls"` selects the row of the CLS token, `"mean"` averages over all rows.

    Returns:
        (B, T) saliency, an attention probability, in float32 or float64.

    Raises:
        ValueError: if `query` is unknown, or is `"cls"` for a sequence without prefix tokens.

    Example:
        >>> rollout = torch.tensor([[[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.2, 0.4, 0.4]]])
        >>> token_saliency(rollout, num_prefix_tokens=1)
        tensor([[0.3000, 0.2000]])
        >>> token_saliency(rollout, num_prefix_tokens=0, query="mean")
        tensor([[0.3000, 0.3000, 0.4000]])
    """
    validate_choice("query", query, SALIENCY_QUERIES)
    rollout = upcast_to_float32(rollout)
    if query == "cls":
        if num_prefix_tokens < 1:
            raise ValueError("query='cls' needs a CLS token, but num_prefix_tokens is 0. Use query='mean'.")
        received = rollout[:, 0]
    else:
        received = rollout.mean(dim=1)
    return received[:, num_prefix_tokens:]


def saliency_gain(saliency: torch.Tensor, rho: float) -> torch.Tensor:
    """Gain matrix, Eq. (6): C_ij = sum_t max(S_j,t - S_i,t - rho, 0).

    The sum is computed as (sum |d| + sum d) / 2 from an L1 distance matrix, which avoids a (B, B, T) tensor. It is
    accumulated in float64, or in float32 on devices without float64. Images with non-finite saliency have a gain of
    zero in their row and column.

    Args:
        saliency: (B, T) saliency of the patch tokens.
        rho: minimum difference in saliency of a replaced token, at least 0. With infinity every gain is zero.

    Returns:
        (B, B) gain. Image i (row) receives tokens from image j (column).

    Example:
        >>> saliency_gain(torch.tensor([[0.25, 0.5], [0.75, 0.25]]), rho=0.125)
        tensor([[0.0000, 0.3750],
                [0.1250, 0.0000]], dtype=torch.float64)
    """
    distance, total, offset = _gain_terms(saliency, rho)
    doubled = distance + (total[None, :] - total[:, None] - offset)
    # Non-finite saliency makes its row and column NaN or infinite.
    return 0.5 * doubled.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0.0)


def _gain_terms(saliency: torch.Tensor, rho: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Terms of twice the gain matrix of `saliency_gain`.

    Returns:
        (B, B) distances, (B,) totals and an offset: 2 C_ij = distance_ij + total_j - total_i - offset, but for
        non-finite and, by rounding, negative values.
    """
    if saliency.numel() == 0:
        return saliency.new_zeros(len(saliency), len(saliency)), saliency.new_zeros(len(saliency)), 0.0
    saliency = saliency.to(torch.float32 if saliency.device.type == "mps" else torch.float64)
    total = saliency.sum(dim=1)
    if rho <= 1:
        return torch.cdist(saliency + rho, saliency, p=1), total, rho * saliency.shape[1]
    # Every rho above the largest difference gives zero. Capping it there avoids cancellation in the sums.
    finite = torch.where(saliency.isfinite(), saliency, 0.0)
    cap = (finite.amax() - finite.amin()).clamp(max=rho)
    return torch.cdist(saliency + cap, saliency, p=1) - cap * saliency.shape[1], total, 0.0


def _maximum_assignment(score: np.ndarray) -> np.ndarray:
    """Assign a different column to each row, so that the sum of scores is the maximum.

    Args:
        score: (R, B) scores, R <= B.

    Returns:
        (R,) columns.
    """
    rows, columns = score.shape
    if rows >= _MIN_PADDED_FRACTION * columns:
        # Rows of zeros take any column. Subtracting the maximum of each column, then of each row, changes all
        # assignments of a square matrix by the same sum. The solver is up to ten times faster with these scores.
        score = np.concatenate([score, np.zeros((columns - rows, columns))])
        score -= score.max(axis=0, keepdims=True)
        score -= score.max(axis=1, keepdims=True)
    return linear_sum_assignment(score, maximize=True)[1][:rows]


@torch.library.custom_op("hf_tokenmixup::optimal_assignment", mutates_args=(), **_CUDAGRAPH_UNSAFE)
def _optimal_assignment(
    distance: torch.Tensor,
    total: torch.Tensor,
    easy: torch.Tensor,
    offset: float,
    scale: float,
    group_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    # The score of an image (row) and its partner (column) is distance + total[column] - total[row] - offset. Returns
    # the partners, and as rows: scale times the score of each image with its partner, and, if easy, with a random
    # image; and 1 if easy. One tensor for all inputs needs only one copy to the CPU.
    packed = torch.cat([distance, total[:, None], easy[:, None].to(distance.dtype)], dim=1).cpu()
    totals, easy_rows = packed[:, -2], packed[:, -1]
    score = packed[:, :-2] + (totals[None, :] - totals[:, None] - offset)
    score = score.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0.0)
    partner = torch.arange(len(packed))
    num_groups = -(-len(packed) // group_size) if group_size else 1
    for group in partner.clone().tensor_split(max(1, num_groups)):
        rows = group[easy_rows[group].bool()]
        if len(rows):
            partner[rows] = group[torch.from_numpy(_maximum_assignment(score[rows][:, group].double().numpy()))]
    gain, random_gain = scale * score.gather(1, partner[:, None])[:, 0], scale * score.mean(dim=1) * easy_rows
    statistics = torch.stack([gain, random_gain, easy_rows])
    return partner.to(distance.device), statistics.to(distance.device, torch.float32)


@_optimal_assignment.register_fake
def _(
    distance: torch.Tensor,
    total: torch.Tensor,
    easy: torch.Tensor,
    offset: float,
    scale: float,
    group_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    partner = distance.new_empty(distance.shape[0], dtype=torch.int64)
    return partner, distance.new_empty((3, distance.shape[0]), dtype=torch.float32)


def optimal_assignment(gain: torch.Tensor, easy: torch.Tensor, group_size: int | None = None) -> torch.Tensor:
    """Partners by optimal matching, Eq. (7): maximize the total gain, with a different partner for each easy image.

    The matching runs on the CPU. It is the only device synchronization of TokenMixup.

    Args:
        gain: (B, B) gain of image i (row) from image j (column).
        easy: (B,) bool, the images to match.
        group_size: match within groups of up to this many consecutive images. Groups are much faster for large
            batches and lose part of the gain. None matches within the complete batch.

    Returns:
        (B,) int64 index of the partner. An image that is not easy is its own partner.

    Raises:
        ValueError: if `group_size` is below 1.

    Example:
        >>> gain = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 3.0], [1.0, 5.0, 0.0]])
        >>> optimal_assignment(gain, easy=torch.tensor([True, True, False]))
        tensor([1, 2, 2])
    """
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size must be at least 1, or None for the complete batch, got {group_size}.")
    return _optimal_assignment(gain.detach(), gain.new_zeros(len(gain)), easy, 0.0, 1.0, group_size)[0]


def random_assignment(easy: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Random partners, a different one for each easy image (ablation of Eq. (7), Table 4).

    Args:
        easy: (B,) bool, the images to match.
        generator: random number generator; None uses torch's default generator.

    Returns:
        (B,) int64 index of the partner. An image that is not easy is its own partner.

    Example:
        >>> random_assignment(torch.tensor([False, False, False]))
        tensor([0, 1, 2])
    """
    identity = torch.arange(len(easy), device=easy.device)
    return torch.where(easy, torch.randperm(len(easy), device=easy.device, **generator_kwargs(generator)), identity)


def replace_mask(saliency: torch.Tensor, partner: torch.Tensor, rho: float) -> torch.Tensor:
    """Mask of the replaced tokens, Eq. (9): S_j,t - S_i,t > rho, where j is the partner of i.

    Args:
        saliency: (B, T) saliency of the patch tokens.
        partner: (B,) int64 index of the partner.
        rho: minimum difference in saliency of a replaced token, at least 0.

    Returns:
        (B, T) bool, True for tokens to replace by the partner's token. NaN compares as False.

    Example:
        >>> replace_mask(torch.tensor([[0.25, 0.5], [0.75, 0.25]]), torch.tensor([1, 0]), rho=0.125)
        tensor([[ True, False],
                [False,  True]])
    """
    saliency = upcast_to_float32(saliency)
    return saliency[partner] - saliency > rho


def random_replace_mask(replaced: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Random mask with the same number of replaced tokens per image (ablation, Table 4).

    Args:
        replaced: (B, T) bool.
        generator: random number generator; None uses torch's default generator.

    Returns:
        (B, T) bool with the same row sums as `replaced`.

    Example:
        >>> mask = torch.tensor([[True, True, False, False], [False, False, False, True]])
        >>> random_replace_mask(mask).sum(dim=1)
        tensor([2, 1])
    """
    rank = (
        torch.rand(replaced.shape, device=replaced.device, **generator_kwargs(generator)).argsort(dim=1).argsort(dim=1)
    )
    return rank < replaced.sum(dim=1, keepdim=True)


def mix_tokens(
    hidden: torch.Tensor, partner: torch.Tensor, replaced: torch.Tensor, num_prefix_tokens: int
) -> torch.Tensor:
    """Replacement of tokens, Eq. (10).

    Tokens are gathered, not multiplied by a mask, so a non-finite token affects only the images that receive it.

    Args:
        hidden: (B, N, D) tokens.
        partner: (B,) int64 index of the partner.
        replaced: (B, T) bool, the patch tokens to replace.
        num_prefix_tokens: P; prefix tokens are never replaced.

    Returns:
        (B, N, D) tokens. Gradients flow to retained and to copied tokens.

    Example:
        >>> hidden = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
        >>> replaced = torch.tensor([[True, False], [False, False]])
        >>> mix_tokens(hidden, torch.tensor([1, 1]), replaced, num_prefix_tokens=1)[..., 0]
        tensor([[1., 5., 3.],
                [4., 5., 6.]])
    """
    return gather_rows(hidden, mixed_rows(partner, replaced, num_prefix_tokens))


def mixed_rows(partner: torch.Tensor, replaced: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """Row of each token after `mix_tokens` among all tokens of a batch before it.

    Args:
        partner: (B,) int64 index of the partner.
        replaced: (B, T) bool, the patch tokens to replace.
        num_prefix_tokens: P; prefix tokens are never replaced.

    Returns:
        (B, N) int64 indices into (B * N, D).

    Example:
        >>> replaced = torch.tensor([[True, False], [False, False]])
        >>> mixed_rows(torch.tensor([1, 1]), replaced, num_prefix_tokens=1)
        tensor([[0, 4, 2],
                [3, 4, 5]])
    """
    if num_prefix_tokens:
        replaced = F.pad(replaced, (num_prefix_tokens, 0), value=False)
    rows = torch.arange(replaced.numel(), device=replaced.device).view_as(replaced)
    return torch.where(replaced, rows[partner], rows)


def gather_rows(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Gather tokens by their rows among all tokens of a batch.

    `index_select` copies complete rows, also in backward. It is several times faster than `gather` or `where`.

    Args:
        hidden: (B, N, D) tokens.
        rows: (B, M) int64 indices into (B * N, D).

    Returns:
        (B, M, D) tokens.

    Example:
        >>> gather_rows(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.tensor([[2], [0]]))[..., 0]
        tensor([[3.],
                [1.]])
    """
    return hidden.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def mix_targets(
    targets: torch.Tensor, saliency: torch.Tensor, partner: torch.Tensor, replaced: torch.Tensor
) -> torch.Tensor:
    """Mixed class distributions, weighted by retained and received saliency, Eq. (11).

    Args:
        targets: (B, C) class distributions.
        saliency: (B, T) saliency of the patch tokens. A tensor of ones weights by the number of tokens.
        partner: (B,) int64 index of the partner.
        replaced: (B, T) bool, the replaced patch tokens.

    Returns:
        (B, C) class distributions in float32 or float64. A row is unchanged if no token is replaced, or if the total
        saliency is zero or not finite.

    Example:
        >>> saliency = torch.tensor([[0.25, 0.25], [0.75, 0.25]])
        >>> replaced = torch.tensor([[True, False], [False, False]])
        >>> mix_targets(torch.eye(2), saliency, torch.tensor([1, 1]), replaced)
        tensor([[0.2500, 0.7500],
                [0.0000, 1.0000]])
    """
    return _interpolate_targets(targets, partner, label_weights(saliency, partner, replaced)[1])


def label_weights(
    saliency: torch.Tensor, partner: torch.Tensor, replaced: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of an image's own label and of its partner's label, Eq. (11): retained and received saliency.

    Args:
        saliency: (B, T) saliency of the patch tokens. A tensor of ones weights by the number of tokens.
        partner: (B,) int64 index of the partner.
        replaced: (B, T) bool, the replaced patch tokens.

    Returns:
        (B,) weight of the own label and (B,) weight of the partner's label, with a sum of 1, in float32 or float64.
        The weights are 1 and 0 if no token is replaced, or if the total saliency is zero or not finite.

    Example:
        >>> saliency = torch.tensor([[0.25, 0.25], [0.75, 0.25]])
        >>> replaced = torch.tensor([[True, False], [False, False]])
        >>> label_weights(saliency, torch.tensor([1, 1]), replaced)
        (tensor([0.2500, 1.0000]), tensor([0.7500, 0.0000]))
    """
    saliency = upcast_to_float32(saliency)
    weight = _partner_weight(saliency, saliency[partner], replaced)
    return 1 - weight, weight


def _partner_weight(saliency: torch.Tensor, partner_saliency: torch.Tensor, replaced: torch.Tensor) -> torch.Tensor:
    # The received saliency has zeros where the total has retained saliency, so one sum computes both.
    retained = F.pad(saliency[None], (0, 0, 0, 0, 1, 0))  # (2, B, T)
    received, total = torch.where(replaced, partner_saliency, retained).sum(dim=2)
    # The division gives NaN for a total that is zero, infinite or NaN.
    return (received / total).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


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
    """Horizontal TokenMixup (HTM), Algorithm 1 from line 4. The order of the images does not change.

    Args:
        hidden: (B, N, D) tokens.
        targets: (B, C) class distributions.
        saliency: (B, T) saliency of the patch tokens.
        easy: (B,) bool, the images to mix.
        rho: minimum difference in saliency of a replaced token, at least 0.
        num_prefix_tokens: P, the number of leading tokens that are never replaced.
        assignment: `"optimal"` or `"random"` partners (Table 4).
        group_size: group size of the optimal assignment, see `optimal_assignment`.
        token_selection: replace tokens by `"saliency"`, or the same number of tokens at `"random"` (Table 4).
        relabel: weight labels by `"saliency"` or by the `"count"` of tokens (Table 4).
        generator: random number generator of the random choices; None uses torch's default generator.

    Returns:
        A `HorizontalMix` of tokens, targets, partners and replaced tokens.

    Raises:
        ValueError: if a choice is unknown, `rho` is negative or NaN, or `saliency` is not of shape (B, T).

    Example:
        >>> hidden = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
        >>> saliency = torch.tensor([[0.25, 0.75], [0.75, 0.25]])
        >>> easy = torch.tensor([True, False])
        >>> mix = horizontal_mix(hidden, torch.eye(2), saliency, easy, rho=0.125, num_prefix_tokens=0)
        >>> mix.hidden[..., 0]
        tensor([[3., 2.],
                [3., 4.]])
        >>> mix.targets
        tensor([[0.5000, 0.5000],
                [0.0000, 1.0000]])
        >>> mix.partner
        tensor([1, 1])
    """
    return horizontal_mix_with_statistics(
        hidden,
        targets,
        saliency,
        easy,
        rho,
        num_prefix_tokens,
        assignment=assignment,
        group_size=group_size,
        token_selection=token_selection,
        relabel=relabel,
        generator=generator,
    )[0]


def horizontal_mix_with_statistics(
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
) -> tuple[HorizontalMix, MixStatistics, torch.Tensor]:
    """Horizontal TokenMixup with statistics per image. Arguments and errors are those of `horizontal_mix`.

    Returns:
        A `HorizontalMix`, its `MixStatistics`, and the rows (B, N) of the mixed tokens, see `mixed_rows`.
    """
    validate_choice("assignment", assignment, ASSIGNMENTS)
    validate_choice("token_selection", token_selection, TOKEN_SELECTIONS)
    validate_choice("relabel", relabel, RELABELS)
    if not rho >= 0:
        raise ValueError(f"rho must be at least 0, got {rho}.")
    _validate_saliency_shape(hidden, saliency, num_prefix_tokens)
    with torch.no_grad():
        saliency = upcast_to_float32(saliency)
        if assignment == "optimal":
            # The matching has the gains on the CPU, so their statistics need no operators of the device.
            distance, total, offset = _gain_terms(saliency, rho)
            partner, rows = _optimal_assignment(distance, total, easy, offset, 0.5, group_size)
            gain, random_gain, is_easy = rows.unbind()
        else:
            partner = random_assignment(easy, generator)
            gain = (saliency[partner] - saliency - rho).clamp(min=0).sum(dim=1)
            random_gain, is_easy = gain, easy.float()
        partner_saliency = saliency[partner]
        replaced = partner_saliency - saliency > rho
        if token_selection == "random":
            replaced = random_replace_mask(replaced, generator)
        if relabel == "saliency":
            partner_weight = _partner_weight(saliency, partner_saliency, replaced)
        else:
            partner_weight = replaced.mean(dim=1, dtype=saliency.dtype)
        rows = mixed_rows(partner, replaced, num_prefix_tokens)
    mix = HorizontalMix(
        hidden=gather_rows(hidden, rows),
        targets=_interpolate_targets(targets, partner, partner_weight),
        partner=partner,
        replaced=replaced,
    )
    return mix, MixStatistics(partner_weight, gain, random_gain, is_easy), rows


def select_salient_tokens(
    hidden: torch.Tensor,
    saliency: torch.Tensor,
    kappa: int,
    num_prefix_tokens: int,
    first: torch.Tensor | None = None,
) -> torch.Tensor:
    """Select the kappa most salient patch tokens of each image (section 3.4).

    Args:
        hidden: (B, N, D) tokens.
        saliency: (B, T) saliency of the patch tokens.
        kappa: number of selected tokens, between 0 and T.
        num_prefix_tokens: P; prefix tokens are never selected.
        first: `first_patch_rows` of `hidden`, if it is known from another layer.

    Returns:
        (B, kappa, D) tokens in order of decreasing saliency.

    Raises:
        ValueError: if `kappa` is out of range, or `saliency` is not of shape (B, T).

    Example:
        >>> hidden = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
        >>> select_salient_tokens(hidden, torch.tensor([[0.1, 0.3, 0.2]]), kappa=2, num_prefix_tokens=1)[..., 0]
        tensor([[3., 4.]])
    """
    return gather_rows(hidden, _salient_rows(hidden, saliency, kappa, num_prefix_tokens, first))


def collect_salient_tokens(
    hidden: torch.Tensor,
    saliency: torch.Tensor,
    kappa: int,
    num_prefix_tokens: int,
    first: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select the kappa most salient patch tokens of each image from the input tokens of a layer.

    Values and gradients are those of `select_salient_tokens`. The gradient of the selected tokens is added to that of
    the layer's tokens in one operator, without a tensor (B, N, D) of zeros, if the layer uses the returned tokens.
    Arguments and errors are those of `select_salient_tokens`.

    Returns:
        (B, N, D) tokens for the layer, equal to `hidden`, and (B, kappa, D) selected tokens.

    Example:
        >>> hidden = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]], requires_grad=True)
        >>> tokens, selected = collect_salient_tokens(hidden, torch.tensor([[0.1, 0.3, 0.2]]), 2, num_prefix_tokens=1)
        >>> (tokens.sum() + selected.sum()).backward()
        >>> hidden.grad[..., 0]
        tensor([[1., 1., 2., 2.]])
    """
    return _CollectTokens.apply(hidden, _salient_rows(hidden, saliency, kappa, num_prefix_tokens, first))


class _CollectTokens(torch.autograd.Function):
    @staticmethod
    def forward(hidden: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden.view_as(hidden), gather_rows(hidden, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_hidden: torch.Tensor, grad_selected: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rows,) = ctx.saved_tensors
        # No row is selected twice, so the order of the additions does not matter.
        grad = grad_hidden.flatten(0, 1).index_add(0, rows.flatten(), grad_selected.flatten(0, 1))
        return grad.view_as(grad_hidden), None


def _salient_rows(
    hidden: torch.Tensor, saliency: torch.Tensor, kappa: int, num_prefix_tokens: int, first: torch.Tensor | None
) -> torch.Tensor:
    """Rows (B, kappa) of the selected tokens among all tokens of a batch."""
    _validate_saliency_shape(hidden, saliency, num_prefix_tokens)
    if not 0 <= kappa <= saliency.shape[1]:
        raise ValueError(f"kappa must be between 0 and the number of patch tokens ({saliency.shape[1]}), got {kappa}.")
    if first is None:
        first = first_patch_rows(hidden, num_prefix_tokens)
    return first + saliency.topk(kappa, dim=1).indices


def first_patch_rows(hidden: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """Row of each image's first patch token among all tokens of a batch.

    Args:
        hidden: (B, N, D) tokens.
        num_prefix_tokens: P.

    Returns:
        (B, 1) int64 indices into (B * N, D).

    Example:
        >>> first_patch_rows(torch.zeros(3, 5, 2), num_prefix_tokens=1)[:, 0]
        tensor([ 1,  6, 11])
    """
    batch, num_tokens, _ = hidden.shape
    last = num_prefix_tokens + batch * num_tokens
    return torch.arange(num_prefix_tokens, last, num_tokens, device=hidden.device)[:, None]


def manifold_mix(
    hidden: torch.Tensor, targets: torch.Tensor, partner: torch.Tensor, share: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Manifold mixup (Verma et al., ICML 2019): interpolate images and labels with those of a partner.

    Args:
        hidden: (B, N, D) tokens.
        targets: (B, C) class distributions.
        partner: (B,) int64 index of the partner, a permutation.
        share: lambda of mixup, the weight of each image in [0, 1], as a number or as a tensor () on the device.

    Returns:
        (B, N, D) tokens and (B, C) class distributions.

    Example:
        >>> hidden, targets = torch.tensor([[[0.0]], [[4.0]]]), torch.eye(2)
        >>> tokens, labels = manifold_mix(hidden, targets, torch.tensor([1, 0]), share=0.75)
        >>> tokens[..., 0]
        tensor([[1.],
                [3.]])
        >>> labels
        tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]])
    """
    return mix_with_partner(hidden, partner, share), mix_with_partner(targets, partner, share)


def mix_with_partner(tensor: torch.Tensor, partner: torch.Tensor, lam: float | torch.Tensor) -> torch.Tensor:
    """Interpolate each row with the row of its partner: lam * row + (1 - lam) * partner.

    Args:
        tensor: (B, ...) in any floating-point dtype. Half precision is interpolated in float32 and rounded once.
        partner: (B,) int64 index of the partner.
        lam: weight of each row in [0, 1], as a number or as a tensor () on the device.

    Returns:
        (B, ...) in the dtype of `tensor`.

    Example:
        >>> mix_with_partner(torch.tensor([[0.0], [4.0]]), torch.tensor([1, 0]), lam=0.75)
        tensor([[1.],
                [3.]])
    """
    upcast = upcast_to_float32(tensor)
    if torch.is_tensor(lam):
        lam = lam.to(upcast.dtype)
    return torch.lerp(upcast[partner], upcast, lam).to(tensor.dtype)


def gather_tokens(hidden: torch.Tensor, image: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Gather tokens by image index and token index.

    Args:
        hidden: (B, N, D) tokens.
        image: int64 image indices that broadcast with `token` to (B, M).
        token: int64 token indices that broadcast with `image` to (B, M).

    Returns:
        (B, M, D) tokens.

    Example:
        >>> hidden = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
        >>> gather_tokens(hidden, torch.tensor([[1, 1], [0, 1]]), torch.tensor([0, 1]))[..., 0]
        tensor([[3., 4.],
                [1., 4.]])
    """
    return gather_rows(hidden, image * hidden.shape[1] + token)


def _interpolate_targets(targets: torch.Tensor, partner: torch.Tensor, partner_weight: torch.Tensor) -> torch.Tensor:
    targets = upcast_to_float32(targets)
    return torch.lerp(targets, targets[partner], partner_weight[:, None].to(targets.dtype))


def _validate_saliency_shape(hidden: torch.Tensor, saliency: torch.Tensor, num_prefix_tokens: int) -> None:
    expected = (hidden.shape[0], hidden.shape[1] - num_prefix_tokens)
    if tuple(saliency.shape) != expected:
        raise ValueError(
            f"saliency must have one value per patch token, shape (B, N - num_prefix_tokens) = {expected}, got "
            f"{tuple(saliency.shape)}."
        )
