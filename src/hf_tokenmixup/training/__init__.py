"""Training with TokenMixup: the trainer, its arguments and callbacks, command-line options and recipes."""

from .arguments import TokenMixupTrainingArguments
from .callbacks import CurvesCallback, JsonLinesCallback
from .faults import NonFiniteLossError
from .lora import LoraArguments, add_lora
from .options import AugmentationArguments, DataArguments, ModelArguments, Options, parse_options
from .space import OutputFolderError, SavingError
from .trainer import TokenMixupTrainer

__all__ = [
    "AugmentationArguments",
    "CurvesCallback",
    "DataArguments",
    "JsonLinesCallback",
    "LoraArguments",
    "ModelArguments",
    "NonFiniteLossError",
    "Options",
    "OutputFolderError",
    "SavingError",
    "TokenMixupTrainer",
    "TokenMixupTrainingArguments",
    "add_lora",
    "parse_options",
]
