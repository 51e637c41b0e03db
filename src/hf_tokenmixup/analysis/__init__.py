"""Looking at what a training did and costs: curves, throughput."""

from .curves import plot_training_curves
from .throughput import measure_throughput

__all__ = ["measure_throughput", "plot_training_curves"]
