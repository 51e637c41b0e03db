"""Training with TokenMixup: the trainer, its arguments, its parts and callbacks."""

from .callbacks import CurvesCallback, JsonLinesCallback
from .checkpointing.disk_space import OutputFolderError, SavingError
from .lora import LoraArguments, add_lora
from .nonfinite import NonFiniteLossError
from .trainer import TokenMixupTrainer
from .training_args import TokenMixupTrainingArguments

__all__ = [
    "CurvesCallback",
    "JsonLinesCallback",
    "LoraArguments",
    "NonFiniteLossError",
    "OutputFolderError",
    "SavingError",
    "TokenMixupTrainer",
    "TokenMixupTrainingArguments",
    "add_lora",
]
