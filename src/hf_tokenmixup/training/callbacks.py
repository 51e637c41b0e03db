"""Callbacks of a run: the log as JSON lines, training curves, the epoch of the data, and frozen layers."""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..data.epochs import FollowsEpochs, epoch_followers
from ..models.gradient_checkpointing import checkpoint_frozen_inputs
from ..visualization.training_curves import plot_training_curves

logger = logging.getLogger(__name__)


class JsonlLoggerCallback(TrainerCallback):
    """Write each log record as one line of JSON to `<output_dir>/training_log.jsonl`.

    The file contains exactly one run: a new run truncates it, a resumed run keeps the records up to the checkpoint.
    Records written before `train()`, such as those of an evaluation, are replaced then. A non-finite number becomes
    `null`. Only the first process writes. If writing fails, for example on a full disk, the run continues, and the
    next record rewrites the file.

    Attributes:
        folder: Replaces the output folder, as each trial of a hyperparameter search has its own.
    """

    file_name = "training_log.jsonl"

    def __init__(self) -> None:
        self.folder: str | None = None
        self._needs_rewrite = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        # The restored state has the records up to the checkpoint, and none that an interrupted run wrote after it.
        self._write(args, state, state.log_history, "w")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self._needs_rewrite:
            self._write(args, state, state.log_history, "w")
        else:
            self._write(args, state, state.log_history[-1:], "a")

    def _write(self, args: TrainingArguments, state: TrainerState, records: list[dict], mode: str) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(self.folder or args.output_dir) / self.file_name
        lines = "".join(json.dumps(_replace_nonfinite(record), allow_nan=False) + "\n" for record in records)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open(mode, encoding="utf-8") as file:
                file.write(lines)
            self._needs_rewrite = False
        except OSError as error:
            if not self._needs_rewrite:
                logger.warning("%s cannot be written now (%s); the run continues.", path, error.strerror)
            self._needs_rewrite = True


class TrainingCurvesCallback(TrainerCallback):
    """Plot accuracy, loss and mixing over the epochs to `<output_dir>/training_curves.png` when training ends.

    Attributes:
        folder: Replaces the output folder, as each trial of a hyperparameter search has its own.
    """

    file_name = "training_curves.png"

    def __init__(self) -> None:
        self.folder: str | None = None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        path = Path(self.folder or args.output_dir) / self.file_name
        if state.is_world_process_zero:
            try:
                plot_training_curves(state.log_history, path)
            except OSError as error:
                # The trained model is still to be saved.
                logger.warning("%s could not be written (%s).", path, error.strerror)


class EpochLogCallback(TrainerCallback):
    """Log at the end of every epoch and of the run, unless `logging_strategy="no"`, whatever `logging_steps` is.

    A run of fewer steps than `logging_steps` has no training loss in its log otherwise. The Trainer logs a step once:
    where the last step has its line already, nothing is added. `TokenMixupTrainer` adds this callback itself, before
    the user's.
    """

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True


class SetEpochCallback(TrainerCallback):
    """Pass the epoch that begins to all training data with `set_epoch`, so that augmentation can depend on it.

    The data may be inside of wrappers such as `Subset` and `ConcatDataset`, see `epoch_followers`. The data loader of
    accelerate passes the epoch to its sampler, or to the dataset that it has itself, and not on resuming within an
    epoch. `TokenMixupTrainer` adds this callback itself. It runs before the workers of an epoch start; persistent
    workers see the epoch only if the dataset has it in shared memory.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self._followers: list[FollowsEpochs] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.epoch = int(state.epoch or 0)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, train_dataloader=None, **kwargs
    ):
        data = getattr(train_dataloader, "dataset", None)
        self._followers = epoch_followers(vars(train_dataloader) if data is None else data)
        self._set(self.epoch)
        self.epoch += 1

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._followers = []

    @contextmanager
    def unchanged(self, eval_dataloader: DataLoader) -> Iterator[None]:
        """A context in which an evaluation does not change the epoch of the training data, which it may read too.

        By itself accelerate sets the epoch of an evaluation's dataset to the number of times its loader was read.
        """
        epoch = getattr(getattr(eval_dataloader, "dataset", None), "epoch", None)
        if isinstance(epoch, int) and hasattr(eval_dataloader, "set_epoch"):
            eval_dataloader.set_epoch(epoch)
        try:
            yield
        finally:
            self._set(self.epoch - 1)

    def _set(self, epoch: int) -> None:
        for data in self._followers:
            data.set_epoch(epoch)


class CheckpointedLayersCallback(TrainerCallback):
    """Give the layers of a plain model their gradients under gradient checkpointing, whatever is frozen before them.

    `TokenMixupTrainer` adds this callback itself. The Trainer turns on gradient checkpointing in `train`, before it
    calls `on_train_begin`.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ):
        checkpoint_frozen_inputs(model)


def _replace_nonfinite(value: Any) -> Any:
    """`value` with every float that is not finite replaced by None, within dicts and lists too."""
    if isinstance(value, dict):
        return {key: _replace_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
