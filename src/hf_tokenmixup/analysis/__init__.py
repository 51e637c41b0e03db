"""Looking at what a training did, how good a model is, what it costs and what TokenMixup does to images."""

from .benchmark import Spread, Timing, interleave, peak_memory
from .cells import TokenCells, implied_images, token_cells
from .costs import count_macs, count_parameters
from .curves import draw_runs, plot_training_curves, read_training_log
from .evaluation import Counts, Evaluation, evaluate_classifier, model_revision
from .figures import check_picture_path, save_figure
from .observations import (
    HorizontalObservation,
    VerticalObservation,
    layer_inputs,
    min_max,
    observe_horizontal,
    observe_vertical,
    predicted_classes,
    saliency_maps,
)
from .pictures import draw_horizontal, draw_saliency, draw_vertical, short_name
from .throughput import measure_throughput

__all__ = [
    "Counts",
    "Evaluation",
    "HorizontalObservation",
    "Spread",
    "Timing",
    "TokenCells",
    "VerticalObservation",
    "check_picture_path",
    "count_macs",
    "count_parameters",
    "draw_horizontal",
    "draw_runs",
    "draw_saliency",
    "draw_vertical",
    "evaluate_classifier",
    "implied_images",
    "interleave",
    "layer_inputs",
    "measure_throughput",
    "min_max",
    "model_revision",
    "observe_horizontal",
    "observe_vertical",
    "peak_memory",
    "plot_training_curves",
    "predicted_classes",
    "read_training_log",
    "saliency_maps",
    "save_figure",
    "short_name",
    "token_cells",
]
