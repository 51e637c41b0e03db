"""Log of a run in the terminal, one line for each record. The complete records are in `training_log.jsonl`."""

from collections.abc import Mapping
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..hub.card_formatting import format_duration

# Titles and formats of the values of a line, by the names of the metrics.
TRAINING = {
    "loss": ("loss", "{:.4g}"),
    "classification_loss": ("classification", "{:.4g}"),
    "scorenet_loss": ("ScoreNet", "{:.4g}"),
    "learning_rate": ("learning rate", "{:.3g}"),
    "easy_fraction": ("easy", "{:.1%}"),
    "mixed_fraction": ("mixed", "{:.1%}"),
    "replaced_fraction": ("replaced", "{:.1%}"),
    "vertical_attention": ("attention to collected tokens", "{:.3g} x uniform"),
}
EVALUATION = {
    "eval_top1": ("top-1", "{:.2%}"),
    "eval_top5": ("top-5", "{:.2%}"),
    "eval_loss": ("loss", "{:.4g}"),
    "eval_calibration_error": ("calibration error", "{:.4f}"),
}


def format_log(logs: Mapping[str, Any]) -> str:
    """Format a record of the trainer's log as a line. A record of another kind is formatted as a dictionary.

    Args:
        logs: values by name; losses in nats, fractions in [0, 1], times in seconds.
    """
    if "eval_loss" in logs:
        text = _format_values(logs, EVALUATION)
    elif "loss" in logs:
        text = _format_values(logs, TRAINING)
    elif "train_runtime" in logs:
        speed = logs.get("train_samples_per_second")
        text = f"trained in {format_duration(logs['train_runtime'])}"
        text += "" if speed is None else f", {speed:,.0f} images per second"
    else:
        return str({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in logs.items()})
    epoch = f"epoch {logs['epoch']:.4g}" if "epoch" in logs else ""
    kind = "evaluation: " if "eval_loss" in logs else ""
    return f"{epoch:<12}{kind}{text}".strip()


class LinePrinterCallback(PrinterCallback):
    """Prints the log as lines, without progress bars."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if logs and state.is_local_process_zero:
            print(format_log(logs), flush=True)


class LineProgressCallback(ProgressCallback):
    """Shows progress bars, and prints the log as lines above them."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if logs and state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(format_log(logs))


def print_log_as_lines(trainer: Trainer) -> None:
    """Replace the callbacks of transformers that print the log as dictionaries.

    Args:
        trainer: before training.
    """
    for callback, lines in ((PrinterCallback, LinePrinterCallback), (ProgressCallback, LineProgressCallback)):
        if trainer.pop_callback(callback) is not None:
            trainer.add_callback(lines)


def _format_values(logs: Mapping[str, Any], formats: Mapping[str, tuple[str, str]]) -> str:
    return "  ".join(
        f"{title} {form.format(logs[name])}" for name, (title, form) in formats.items() if logs.get(name) is not None
    )
