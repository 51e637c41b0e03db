"""Which pixels of an image a token stands for, and what an image looks like when tokens are exchanged."""

from dataclasses import dataclass

import torch

from ..models import TokenMixupModelMixin, height_and_width


@dataclass(frozen=True)
class TokenGrid:
    """The pixels that tokens stand for: token (r, k) has rows [rows[r], rows[r + 1]) and columns likewise.

    `exact` is False where tokens come from overlapping convolutions, and a cell is but the middle of what one sees.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    exact: bool


def compute_token_grid(model: TokenMixupModelMixin, height: int, width: int) -> TokenGrid:
    """Where the patch tokens of an image of this size lie in it."""
    rows, columns = model.token_grid(height, width)
    exact = getattr(model.config, "tokenizer", "patch") == "patch"
    # Patches leave pixels over at the right and at the bottom where the size is no multiple of theirs.
    tall, wide = height_and_width(model.config.patch_size) if exact else (height / rows, width / columns)
    return TokenGrid(
        rows=tuple(round(tall * row) for row in range(rows + 1)),
        columns=tuple(round(wide * column) for column in range(columns + 1)),
        exact=exact,
    )


def render_mixed_images(
    images: torch.Tensor, partner: torch.Tensor, replaced: torch.Tensor, cells: TokenGrid
) -> torch.Tensor:
    """The mixed images as their tokens imply them: the partner's pixels in the cells of replaced tokens.

    Args:
        images: (B, channels, H, W).
        partner: (B,) int64.
        replaced: (B, R, K) bool, the tokens taken from the partner.
        cells: of this size.

    Returns:
        (B, channels, H, W).
    """
    tall, wide = (torch.tensor(edges, device=images.device).diff() for edges in (cells.rows, cells.columns))
    replaced = replaced.repeat_interleave(tall, dim=1).repeat_interleave(wide, dim=2)
    mask = torch.zeros_like(images[:, :1], dtype=torch.bool)
    mask[:, 0, : replaced.shape[1], : replaced.shape[2]] = replaced
    return torch.where(mask, images[partner], images)
