"""Vertical TokenMixup (VTM): salient tokens of earlier layers as keys and values (paper: section 3.4, Eq. (13))."""

import torch

from .functional import collect_salient_tokens, first_patch_rows, select_salient_tokens


class VerticalMemory:
    """Salient tokens of the earlier layers in one forward pass.

    Args:
        kappa: number of tokens that each layer contributes per image.
        detach: detach the collected tokens from the graph.
        num_prefix_tokens: P; prefix tokens are never collected.
    """

    def __init__(self, kappa: int, detach: bool, num_prefix_tokens: int):
        self.kappa = kappa
        self.detach = detach
        self.num_prefix_tokens = num_prefix_tokens
        self._tokens: list[torch.Tensor] = []
        self._saliency: list[torch.Tensor] = []
        self._first: torch.Tensor | None = None

    def collect(self, hidden: torch.Tensor, saliency: torch.Tensor) -> torch.Tensor:
        """Store the kappa most salient input tokens of a layer.

        Args:
            hidden: (B, N, D) input tokens of the layer.
            saliency: (B, T) saliency of the patch tokens.

        Returns:
            (B, N, D) the input tokens, for the layer. With these the gradient of the stored tokens costs less.
        """
        if self._first is None:
            # All layers of a forward pass have the same number of tokens.
            self._first = first_patch_rows(hidden, self.num_prefix_tokens)
        arguments = (saliency, self.kappa, self.num_prefix_tokens, self._first)
        if self.detach:
            tokens = select_salient_tokens(hidden.detach(), *arguments)
        else:
            hidden, tokens = collect_salient_tokens(hidden, *arguments)
        self._tokens.append(tokens)
        self._saliency.append(saliency)
        return hidden

    @property
    def num_tokens(self) -> int:
        """Number of stored tokens per image, L * kappa after L layers."""
        return sum(tokens.shape[1] for tokens in self._tokens)

    def tokens(self) -> torch.Tensor:
        """Return the stored tokens (B, L * kappa, D), the earliest layer first, without normalization."""
        return torch.cat(self._tokens, dim=1)

    def positions(self) -> torch.Tensor:
        """Return the indices (B, L * kappa) among the patch tokens from which the stored tokens come."""
        return torch.cat([saliency.topk(self.kappa, dim=1).indices for saliency in self._saliency], dim=1)
