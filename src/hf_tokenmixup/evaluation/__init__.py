"""Evaluation: accuracy of a classifier, its parameters and multiply-accumulate operations."""

from .evaluate import EvaluationResult, MetricSums, evaluate_classifier, model_revision
from .flops import count_macs, count_parameters

__all__ = ["MetricSums", "EvaluationResult", "count_macs", "count_parameters", "evaluate_classifier", "model_revision"]
