"""Figures of training runs, and of what TokenMixup does to images."""

from .figure_utils import save_figure, validate_figure_path
from .inspection import (
    HorizontalMixTrace,
    VerticalMemoryTrace,
    layer_inputs,
    min_max,
    predicted_classes,
    saliency_maps,
    trace_horizontal_mixup,
    trace_vertical_memory,
)
from .plots import plot_horizontal_mixup, plot_saliency, plot_vertical_memory, short_name
from .token_grid import TokenGrid, compute_token_grid, render_mixed_images
from .training_curves import plot_runs, plot_training_curves, read_training_log

__all__ = [
    "HorizontalMixTrace",
    "TokenGrid",
    "VerticalMemoryTrace",
    "validate_figure_path",
    "plot_horizontal_mixup",
    "plot_runs",
    "plot_saliency",
    "plot_vertical_memory",
    "render_mixed_images",
    "layer_inputs",
    "min_max",
    "trace_horizontal_mixup",
    "trace_vertical_memory",
    "plot_training_curves",
    "predicted_classes",
    "read_training_log",
    "saliency_maps",
    "save_figure",
    "short_name",
    "compute_token_grid",
]
