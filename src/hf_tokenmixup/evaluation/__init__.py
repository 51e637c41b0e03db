"""Evaluation: accuracy, number of parameters and multiply-accumulate operations of a classifier."""

from .evaluate import EvaluationResult, MetricSums, evaluate_classifier, resolve_model_revision
from .flops import count_macs, count_parameters

__all__ = [
    "EvaluationResult",
    "MetricSums",
    "count_macs",
    "count_parameters",
    "evaluate_classifier",
    "resolve_model_revision",
]
