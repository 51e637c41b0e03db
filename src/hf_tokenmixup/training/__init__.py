"""Training with TokenMixup: the trainer, its arguments and its callbacks."""

from .arguments import TokenMixupTrainingArguments
from .callbacks import CurvesCallback, JsonLinesCallback
from .recipes import expand_recipe, refuse_unknown_options
from .trainer import TokenMixupTrainer

__all__ = [
    "CurvesCallback",
    "JsonLinesCallback",
    "TokenMixupTrainer",
    "TokenMixupTrainingArguments",
    "expand_recipe",
    "refuse_unknown_options",
]
