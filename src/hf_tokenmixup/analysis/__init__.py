"""Looking at what a training did: curves."""

from .curves import plot_training_curves

__all__ = ["plot_training_curves"]
