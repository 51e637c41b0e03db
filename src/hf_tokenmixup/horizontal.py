"""Horizontal TokenMixup: ScoreNet and the step in front of a layer (paper: sections 3.1 to 3.3, Algorithm 1)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .functional import check_choice, difficulty, horizontal_mix

SCORENET_POOLINGS = ("cls", "mean", "attention")


class HorizontalMixRecord(NamedTuple):
    """What happened in front of one horizontal layer.

    Attributes:
        scorenet_logits: (B, C) ScoreNet's prediction.
        difficulty: (B,) its cross-entropy against the targets that entered, in nats, without gradient.
        easy: (B,) bool.
        saliency: (B, T) of the tokens that entered.
        partner: (B,) int64.
        replaced: (B, T) bool.
    """

    scorenet_logits: torch.Tensor
    difficulty: torch.Tensor
    easy: torch.Tensor
    saliency: torch.Tensor
    partner: torch.Tensor
    replaced: torch.Tensor


class ScoreNet(nn.Module):
    """Predicts the class from intermediate tokens, so that its loss tells how difficult an image is (section 3.1).

    Args:
        hidden_size: D.
        num_labels: C.
        pooling: ``"cls"`` reads the first token; ``"mean"`` averages the patch tokens; ``"attention"`` averages them
            with the softmax of a learned linear score.
        num_prefix_tokens: P.

    Raises:
        ValueError: for another pooling, or for ``"cls"`` without a prefix token.
    """

    def __init__(self, hidden_size: int, num_labels: int, *, pooling: str, num_prefix_tokens: int):
        super().__init__()
        check_choice("scorenet_pooling", pooling, SCORENET_POOLINGS)
        if pooling == "cls" and num_prefix_tokens < 1:
            raise ValueError("scorenet_pooling='cls' needs a CLS token, but there is none: use 'attention' or 'mean'.")
        self.pooling = pooling
        self.num_prefix_tokens = num_prefix_tokens
        self.classifier = nn.Linear(hidden_size, num_labels)
        self.attention = nn.Linear(hidden_size, 1) if pooling == "attention" else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, N, D) tokens to (B, C) class scores, outside of autocast: a decision hangs on them."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self.classifier.weight.dtype)
            patches = hidden[:, self.num_prefix_tokens :]
            if self.pooling == "cls":
                pooled = hidden[:, 0]
            elif self.attention is None:
                pooled = patches.mean(dim=1)
            else:
                weight = self.attention(patches).softmax(dim=1)  # (B, T, 1)
                pooled = (weight.transpose(1, 2) @ patches).squeeze(1)
            return self.classifier(pooled)


def apply_horizontal_mixup(
    scorenet: ScoreNet,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    detect_saliency: Callable[[torch.Tensor], torch.Tensor],
    *,
    tau: float | None,
    rho: float,
    detach: bool,
    num_prefix_tokens: int,
    assignment: str = "optimal",
    group_size: int | None = None,
    token_selection: str = "saliency",
    relabel: str = "saliency",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, HorizontalMixRecord]:
    """Algorithm 1 as a whole: judge, detect, pair, replace, relabel.

    Args:
        scorenet: judges the difficulty.
        hidden: (B, N, D) tokens that enter the layer.
        targets: (B, C) class distributions as they enter the layer.
        detect_saliency: (B, N, D) to (B, T).
        tau: images with a difficulty below it, in nats, are easy; None makes every image easy.
        rho: least gain in saliency of a replaced token.
        detach: keep ScoreNet's gradient away from the tokens.
        num_prefix_tokens: P.
        assignment, group_size, token_selection, relabel: see :func:`~hf_tokenmixup.functional.horizontal_mix`.

    Returns:
        (B, N, D) mixed tokens, (B, C) mixed targets, (B,) ScoreNet's loss, and the record of the step.
    """
    logits = scorenet(hidden.detach() if detach else hidden)
    loss = difficulty(logits, targets)
    score = loss.detach()
    easy = torch.ones_like(score, dtype=torch.bool) if tau is None else score < tau
    saliency = detect_saliency(hidden.detach())
    mix = horizontal_mix(
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
    )
    return mix.hidden, mix.targets, loss, HorizontalMixRecord(logits, score, easy, saliency, mix.partner, mix.replaced)
