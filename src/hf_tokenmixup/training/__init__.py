"""Training with TokenMixup: the trainer, its arguments, its parts and callbacks."""

from .callbacks import JsonlLoggerCallback, TrainingCurvesCallback
from .checkpointing.disk_space import OutputDirError, SaveError
from .layer_decay import apply_layer_decay
from .lora import LoraArguments, add_lora
from .metrics import MixingMetrics
from .mixing_callback import TokenMixupCallback
from .nonfinite import NonFiniteLossError
from .trainer import TokenMixupTrainer
from .training_args import TokenMixupTrainingArguments

__all__ = [
    "TrainingCurvesCallback",
    "JsonlLoggerCallback",
    "LoraArguments",
    "MixingMetrics",
    "NonFiniteLossError",
    "OutputDirError",
    "SaveError",
    "TokenMixupCallback",
    "TokenMixupTrainer",
    "TokenMixupTrainingArguments",
    "add_lora",
    "apply_layer_decay",
]
