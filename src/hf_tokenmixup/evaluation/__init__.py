"""Evaluation: accuracy, parameters and multiply-accumulate operations of a classifier, and a forecast of settings."""

from .calibration import CalibrationResult, SettingsForecast, calibrate, forecast_settings
from .corruptions import CORRUPTIONS, CorruptedTransform, CorruptionResult, average_corruptions
from .evaluate import (
    EvaluationResult,
    MetricSums,
    evaluate_classifier,
    evaluate_corruptions,
    resolve_model_revision,
)
from .flops import count_macs, count_parameters
from .forecasts import EasyForecast, HorizontalForecast, LayerCalibration, VerticalForecast
from .suggestions import SuggestedSettings, suggest_settings

__all__ = [
    "CORRUPTIONS",
    "CalibrationResult",
    "CorruptedTransform",
    "CorruptionResult",
    "EasyForecast",
    "EvaluationResult",
    "HorizontalForecast",
    "LayerCalibration",
    "MetricSums",
    "SettingsForecast",
    "SuggestedSettings",
    "VerticalForecast",
    "average_corruptions",
    "calibrate",
    "count_macs",
    "count_parameters",
    "evaluate_classifier",
    "evaluate_corruptions",
    "forecast_settings",
    "resolve_model_revision",
    "suggest_settings",
]
