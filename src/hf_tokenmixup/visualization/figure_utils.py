"""Figures without pyplot: no display, backend or global figure of the caller is touched."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# Okabe and Ito's palette: told apart with every kind of colour vision.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
AMBER, SKY, PURPLE, BLACK = "#E69F00", "#56B4E9", "#CC79A7", "#000000"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BLACK)
# Line styles differ too, for print in grey.
SOLID, DASHED, DOTTED, DASH_DOTTED = "-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5))
STYLES = (SOLID, DASHED, DOTTED, DASH_DOTTED)
FORMATS = (".png", ".pdf")
IMAGE_SIZE_INCHES = 1.9  # inches, the shorter side of an image


def new_figure(width: float, height: float, dpi: int = 120) -> Figure:
    """An empty figure of this size in inches, whose parts make room for each other."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def image_grid(
    size: tuple[int, int], rows: int, headings: Sequence[str], right: float = 0.0, bottom: float = 0.0
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns) for images of this size, a heading above each column.

    `right` and `bottom` are inches kept free for what stands there.
    """
    height, width = size
    scale = IMAGE_SIZE_INCHES / min(height, width)
    tall, wide = scale * height + 0.35, max(scale * width + 0.15, IMAGE_SIZE_INCHES)
    figure = new_figure(max(len(headings) * wide + right, 6.0), rows * tall + bottom + 1.4)
    grid = figure.subplots(rows, len(headings), squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    for axes, heading in zip(grid[0], headings, strict=True):
        axes.set_title(heading, fontsize=11, fontweight="bold")
    return figure, grid


def add_title(figure: Figure, title: str, *lines: str) -> None:
    """A headline, and lines below it that are broken where the figure ends."""
    letters = int(figure.get_figwidth() * 10.5)
    broken = [part for line in lines for part in textwrap.wrap(line, letters)]
    figure.suptitle("\n".join([*textwrap.wrap(title, letters), *broken]), x=0.01, ha="left", fontsize=12)


def add_legend(figure: Figure, *handles: Patch, side: str) -> None:
    """A legend below all axes, at the left or at the right."""
    figure.legend(handles=handles, loc=f"outside lower {side}", ncols=len(handles), frameon=False, fontsize=11)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG or PDF, by the file's ending; missing folders are made.

    Raises:
        ValueError: for another ending.
    """
    path = validate_figure_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format=path.suffix.lower()[1:])
    return path


def validate_figure_path(path: str | Path) -> Path:
    """The path, if a picture can be written there.

    Raises:
        ValueError: for an ending that is neither .png nor .pdf, and for a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"A picture's path must name a file, and {path} is a folder.")
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"A picture's file name must end in .png or .pdf, got {path.name!r}.")
    return path
