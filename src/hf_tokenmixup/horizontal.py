"""Horizontal TokenMixup (HTM): ScoreNet and the mixing before a layer (paper: sections 3.1 to 3.3, Algorithm 1)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from .functional import HorizontalMix, MixStatistics, difficulty, horizontal_mix_with_statistics, validate_choice

if TYPE_CHECKING:
    from .configuration import TokenMixupConfigMixin

SCORENET_POOLINGS = ("cls", "mean", "attention")


class HorizontalMixRecord(NamedTuple):
    """Record of horizontal mixing before one layer.

    Attributes:
        scorenet_logits: (B, C) class scores of ScoreNet.
        difficulty: (B,) cross-entropy of ScoreNet with the targets before mixing, in nats, without gradient.
        easy: (B,) bool, the images that were mixed.
        saliency: (B, T) saliency of the tokens before mixing.
        partner: (B,) int64 index of each image's partner.
        replaced: (B, T) bool, True where a patch token was replaced by the partner's token.
        statistics: label weights and saliency gains per image.
        rows: (B, N) int64 row of each mixed token among all tokens (B * N, D) before mixing.
    """

    scorenet_logits: torch.Tensor
    difficulty: torch.Tensor
    easy: torch.Tensor
    saliency: torch.Tensor
    partner: torch.Tensor
    replaced: torch.Tensor
    statistics: MixStatistics
    rows: torch.Tensor


class ScoreNet(nn.Module):
    """Classifier of intermediate tokens. Its loss is the difficulty of an image (section 3.1).

    Args:
        hidden_size: D.
        num_labels: C.
        pooling: `"cls"` selects the first token, `"mean"` averages the patch tokens, `"attention"` averages them with
            the softmax of a learned linear score.
        num_prefix_tokens: P, the number of leading tokens that are not patch tokens.

    Raises:
        ValueError: if `pooling` is unknown, or is `"cls"` without prefix tokens.
    """

    def __init__(self, hidden_size: int, num_labels: int, *, pooling: str, num_prefix_tokens: int):
        super().__init__()
        validate_choice("scorenet_pooling", pooling, SCORENET_POOLINGS)
        if pooling == "cls" and num_prefix_tokens < 1:
            raise ValueError("scorenet_pooling='cls' needs a CLS token, but there is none. Use 'attention' or 'mean'.")
        self.pooling = pooling
        self.num_prefix_tokens = num_prefix_tokens
        self.classifier = nn.Linear(hidden_size, num_labels)
        self.attention = nn.Linear(hidden_size, 1) if pooling == "attention" else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Classify tokens (B, N, D), with class scores (B, C).

        Autocast is disabled, so the selection of easy images does not depend on the autocast dtype.
        """
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


def horizontal_mix_from_config(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    saliency: torch.Tensor,
    easy: torch.Tensor,
    config: "TokenMixupConfigMixin",
    *,
    rho: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[HorizontalMix, MixStatistics, torch.Tensor]:
    """Call `hf_tokenmixup.functional.horizontal_mix_with_statistics` with the settings of a configuration.

    Args:
        hidden: (B, N, D) tokens.
        targets: (B, C) class distributions.
        saliency: (B, T) saliency of the patch tokens.
        easy: (B,) bool, the images to mix.
        config: model configuration.
        rho: minimum difference in saliency of a replaced token, instead of the configuration's.
        generator: random number generator of the random choices; None uses torch's default generator.
    """
    return horizontal_mix_with_statistics(
        hidden,
        targets,
        saliency,
        easy,
        config.effective_rho(saliency.shape[1]) if rho is None else rho,
        config.num_prefix_tokens,
        assignment=config.assignment,
        group_size=config.assignment_group_size,
        token_selection=config.token_selection,
        relabel=config.relabel,
        generator=generator,
    )


def apply_horizontal_mixup(
    scorenet: ScoreNet,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    saliency_fn: Callable[[torch.Tensor], torch.Tensor],
    config: "TokenMixupConfigMixin",
    labels: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, HorizontalMixRecord]:
    """Apply Algorithm 1: score the images, detect saliency, assign partners, mix tokens and labels.

    Args:
        scorenet: predicts the difficulty.
        hidden: (B, N, D) input tokens of the layer.
        targets: (B, C) class distributions of the input tokens.
        saliency_fn: computes the saliency (B, T) of tokens (B, N, D).
        config: model configuration. Images with a difficulty below `effective_tau` are easy. With `scorenet_detach`,
            the gradient of ScoreNet's loss does not reach the tokens.
        labels: (B,) int64 class indices, if the targets are not mixed yet.

    Returns:
        Mixed tokens (B, N, D), mixed class distributions (B, C), ScoreNet's loss (B,) in nats, and the record of the
        layer.
    """
    logits = scorenet(hidden.detach() if config.scorenet_detach else hidden)
    loss = difficulty(logits, targets if labels is None else labels)
    image_difficulty = loss.detach()
    tau = config.effective_tau
    easy = torch.ones_like(image_difficulty, dtype=torch.bool) if tau is None else image_difficulty < tau
    saliency = saliency_fn(hidden.detach())
    mix, statistics, rows = horizontal_mix_from_config(hidden, targets, saliency, easy, config)
    record = HorizontalMixRecord(logits, image_difficulty, easy, saliency, mix.partner, mix.replaced, statistics, rows)
    return mix.hidden, mix.targets, loss, record
