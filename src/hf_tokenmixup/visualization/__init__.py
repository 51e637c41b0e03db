"""Figures of training runs, and of what TokenMixup does to images."""

from .figure_utils import check_picture_path, save_figure
from .inspection import (
    HorizontalObservation,
    VerticalObservation,
    layer_inputs,
    min_max,
    observe_horizontal,
    observe_vertical,
    predicted_classes,
    saliency_maps,
)
from .plots import draw_horizontal, draw_saliency, draw_vertical, short_name
from .token_grid import TokenCells, implied_images, token_cells
from .training_curves import draw_runs, plot_training_curves, read_training_log

__all__ = [
    "HorizontalObservation",
    "TokenCells",
    "VerticalObservation",
    "check_picture_path",
    "draw_horizontal",
    "draw_runs",
    "draw_saliency",
    "draw_vertical",
    "implied_images",
    "layer_inputs",
    "min_max",
    "observe_horizontal",
    "observe_vertical",
    "plot_training_curves",
    "predicted_classes",
    "read_training_log",
    "saliency_maps",
    "save_figure",
    "short_name",
    "token_cells",
]
