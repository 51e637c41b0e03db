"""Vertical TokenMixup: salient tokens of earlier layers as further keys and values (paper: section 3.4, Eq. (13))."""

import torch

from .functional import select_salient_tokens


class VerticalMemory:
    """The salient tokens of the layers passed so far, in one forward.

    Args:
        kappa: tokens that every layer contributes.
        detach: keep the gradient of later layers away from the collected tokens.
        num_prefix_tokens: P; prefix tokens are never collected.
    """

    def __init__(self, kappa: int, detach: bool, num_prefix_tokens: int):
        self.kappa = kappa
        self.detach = detach
        self.num_prefix_tokens = num_prefix_tokens
        self._tokens: list[torch.Tensor] = []

    def collect(self, hidden: torch.Tensor, saliency: torch.Tensor) -> None:
        """Keep the kappa most salient of the tokens (B, N, D) that a layer saw, ranked by ``saliency`` (B, T)."""
        tokens = select_salient_tokens(hidden, saliency, self.kappa, self.num_prefix_tokens)
        self._tokens.append(tokens.detach() if self.detach else tokens)

    @property
    def num_tokens(self) -> int:
        """L * kappa, how many tokens of each image were collected so far."""
        return sum(tokens.shape[1] for tokens in self._tokens)

    def tokens(self) -> torch.Tensor:
        """(B, L * kappa, D) tokens of the L layers passed so far, the earliest layer first, before any norm."""
        return torch.cat(self._tokens, dim=1)
