"""Looking at what a training did, how good a model is and what it costs: curves, evaluation, costs, throughput."""

from .costs import count_macs, count_parameters
from .curves import plot_training_curves
from .evaluation import Counts, Evaluation, evaluate_classifier, model_revision
from .throughput import measure_throughput

__all__ = [
    "Counts",
    "Evaluation",
    "count_macs",
    "count_parameters",
    "evaluate_classifier",
    "measure_throughput",
    "model_revision",
    "plot_training_curves",
]
