"""Helpers for figures without pyplot, which leave the caller's backend and figures unchanged."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# Palette of Okabe and Ito, for all types of color vision.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
AMBER, SKY, PURPLE, BLACK = "#E69F00", "#56B4E9", "#CC79A7", "#000000"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BLACK)
# Line styles differ too, for grayscale prints.
SOLID, DASHED, DOTTED, DASH_DOTTED = "-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5))
STYLES = (SOLID, DASHED, DOTTED, DASH_DOTTED)
FORMATS = (".png", ".pdf")
IMAGE_SIZE_INCHES = 1.9  # shorter side of an image


def new_figure(width: float, height: float, dpi: int = 120) -> Figure:
    """Create an empty figure with constrained layout; `width` and `height` are in inches."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def image_grid(
    size: tuple[int, int], rows: int, headings: Sequence[str], right: float = 0.0, bottom: float = 0.0
) -> tuple[Figure, np.ndarray]:
    """Create a figure with a grid of axes for images, with a heading above each column.

    Args:
        size: Height and width of an image in pixels.
        rows: Number of rows.
        headings: Headings of the columns.
        right: Free space on the right in inches.
        bottom: Free space at the bottom in inches.

    Returns:
        The figure and its axes (rows, columns).
    """
    height, width = size
    scale = IMAGE_SIZE_INCHES / min(height, width)
    row_height, column_width = scale * height + 0.35, max(scale * width + 0.15, IMAGE_SIZE_INCHES)
    figure = new_figure(max(len(headings) * column_width + right, 6.0), rows * row_height + bottom + 1.4)
    grid = figure.subplots(rows, len(headings), squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    for axes, heading in zip(grid[0], headings, strict=True):
        axes.set_title(heading, fontsize=11, fontweight="bold")
    return figure, grid


def add_title(figure: Figure, title: str, *lines: str) -> None:
    """Add a title and further lines, wrapped at the width of the figure."""
    width = int(figure.get_figwidth() * 10.5)
    wrapped = [part for line in (title, *lines) for part in textwrap.wrap(line, width)]
    figure.suptitle("\n".join(wrapped), x=0.01, ha="left", fontsize=12)


def add_legend(figure: Figure, *handles: Patch, side: str) -> None:
    """Add a legend below all axes; `side` is `left` or `right`."""
    figure.legend(handles=handles, loc=f"outside lower {side}", ncols=len(handles), frameon=False, fontsize=11)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Save a figure as PNG or PDF, depending on the suffix. Missing folders are created.

    Raises:
        ValueError: The suffix is neither `.png` nor `.pdf`.
    """
    path = validate_figure_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format=path.suffix.lower()[1:])
    return path


def validate_figure_path(path: str | Path) -> Path:
    """Check the path of a figure and return it.

    Raises:
        ValueError: The suffix is neither `.png` nor `.pdf`, or the path is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"The path of a figure must be a file, but {path} is a folder.")
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"The file name of a figure must end in .png or .pdf, got {path.name!r}.")
    return path
