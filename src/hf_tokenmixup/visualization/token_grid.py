"""Pixels of an image that belong to a token, and images with exchanged tokens."""

from dataclasses import dataclass

import torch

from ..models import TokenMixupModelMixin


@dataclass(frozen=True)
class TokenGrid:
    """Pixel edges of the token grid: token (r, k) covers the rows [rows[r], rows[r + 1]), and columns likewise.

    Attributes:
        rows: R + 1 edges in pixels.
        columns: K + 1 edges in pixels.
        exact: Whether tokens are patches. With overlapping convolutions, a cell is the center of the receptive field.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    exact: bool


def compute_token_grid(model: TokenMixupModelMixin, height: int, width: int) -> TokenGrid:
    """Compute the token grid for images of `height` x `width` pixels."""
    rows, columns = model.token_grid(height, width)
    patch_size = model.config.network.patch_size
    # Patches do not cover the right and bottom border if the image size is not a multiple of the patch size.
    cell_height, cell_width = patch_size or (height / rows, width / columns)
    return TokenGrid(
        rows=tuple(round(cell_height * row) for row in range(rows + 1)),
        columns=tuple(round(cell_width * column) for column in range(columns + 1)),
        exact=patch_size is not None,
    )


def render_mixed_images(
    images: torch.Tensor, partner: torch.Tensor, replaced: torch.Tensor, token_grid: TokenGrid
) -> torch.Tensor:
    """Render mixed images: the cells of replaced tokens have the pixels of the partner.

    Args:
        images: (B, channels, H, W).
        partner: (B,) int64, index of each image's partner.
        replaced: (B, R, K) bool, tokens taken from the partner.
        token_grid: Token grid of the images.

    Returns:
        (B, channels, H, W).
    """
    heights, widths = (
        torch.tensor(edges, device=images.device).diff() for edges in (token_grid.rows, token_grid.columns)
    )
    replaced = replaced.repeat_interleave(heights, dim=1).repeat_interleave(widths, dim=2)
    mask = torch.zeros_like(images[:, :1], dtype=torch.bool)
    mask[:, 0, : replaced.shape[1], : replaced.shape[2]] = replaced
    return torch.where(mask, images[partner], images)
