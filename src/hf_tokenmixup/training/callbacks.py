"""Callbacks of `TokenMixupTrainer`: log file, training curves, epoch of the data, and gradient checkpointing."""

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

    The file contains exactly one run: a new run truncates it, and a resumed run removes the records after the
    checkpoint. `train()` also removes earlier records, such as those of an evaluation. A non-finite number becomes
    `null`. Only the main process writes. If writing fails, for example on a full disk, the run continues, and the next
    record rewrites the file.

    Attributes:
        folder: Folder of the file, such as that of a trial of a hyperparameter search. None: the output folder.
    """

    file_name = "training_log.jsonl"

    def __init__(self) -> None:
        self.folder: str | None = None
        self._needs_rewrite = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        # The log history of a resumed run ends at the checkpoint.
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
        folder: Folder of the file, such as that of a trial of a hyperparameter search. None: the output folder.
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
                # The run continues, since the trained model is not saved yet.
                logger.warning("%s could not be written (%s).", path, error.strerror)


class EpochLogCallback(TrainerCallback):
    """Log at the end of each epoch for any value of `logging_steps`, unless `logging_strategy="no"`.

    Without this callback, a run with fewer steps than `logging_steps` logs no training loss. Trainer does not log a
    step twice. `TokenMixupTrainer` adds this callback before those of the user.
    """

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True


class SetEpochCallback(TrainerCallback):
    """Call `set_epoch` of all training datasets when an epoch begins, so that augmentation can depend on the epoch.

    The datasets may be inside of wrappers such as `Subset` and `ConcatDataset`, see `epoch_followers`. accelerate
    calls `set_epoch` of the sampler or of the outermost dataset only, and not if a run resumes within an epoch. The
    workers of an epoch start after this callback. Persistent workers read the new epoch only from shared memory.
    `TokenMixupTrainer` adds this callback.
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
        self._set_epoch(self.epoch)
        self.epoch += 1

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._followers = []

    @contextmanager
    def preserve_epoch(self, eval_dataloader: DataLoader) -> Iterator[None]:
        """Preserve the epoch of the training data during an evaluation, which may read the same datasets.

        accelerate sets the epoch of an evaluation dataset to the number of completed passes over its data loader.

        Args:
            eval_dataloader: Data loader of the evaluation.
        """
        epoch = getattr(getattr(eval_dataloader, "dataset", None), "epoch", None)
        if isinstance(epoch, int) and hasattr(eval_dataloader, "set_epoch"):
            eval_dataloader.set_epoch(epoch)
        try:
            yield
        finally:
            self._set_epoch(self.epoch - 1)

    def _set_epoch(self, epoch: int) -> None:
        for dataset in self._followers:
            dataset.set_epoch(epoch)


class CheckpointedLayersCallback(TrainerCallback):
    """Compute the gradients of checkpointed layers of a plain model even if all earlier layers are frozen.

    Trainer turns on gradient checkpointing in `train`, before it calls `on_train_begin`. `TokenMixupTrainer` adds this
    callback.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ):
        checkpoint_frozen_inputs(model)


def _replace_nonfinite(value: Any) -> Any:
    """Replace every non-finite float by None, also in nested dicts and lists."""
    if isinstance(value, dict):
        return {key: _replace_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
