"""Evaluation: accuracy of a classifier, its parameters and multiply-accumulate operations."""

from .evaluate import Counts, Evaluation, evaluate_classifier, model_revision
from .flops import count_macs, count_parameters

__all__ = ["Counts", "Evaluation", "count_macs", "count_parameters", "evaluate_classifier", "model_revision"]
