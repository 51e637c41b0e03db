"""Figures of training runs and of TokenMixup in a model."""

from .calibration import plot_calibration
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
    "compute_token_grid",
    "layer_inputs",
    "min_max",
    "plot_calibration",
    "plot_horizontal_mixup",
    "plot_runs",
    "plot_saliency",
    "plot_training_curves",
    "plot_vertical_memory",
    "predicted_classes",
    "read_training_log",
    "render_mixed_images",
    "saliency_maps",
    "save_figure",
    "short_name",
    "trace_horizontal_mixup",
    "trace_vertical_memory",
    "validate_figure_path",
]
