"""What a resumed training needs so that its log goes on too as if nothing had been, and the host does not keep.

It is kept in a checkpoint's `trainer_state.json`: the loss summed since the last log line and since the beginning,
and whether an evaluation or the end of an epoch still had to come when the checkpoint was written.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..preemption import TerminatingTrainer, ignore_sigterm_in_worker
from ..processes import CommonSampler, common_seed, draws_by_rank
from .integrity import CALLBACK_STATE_KEY, find_checkpoint_error, list_checkpoints

logger = logging.getLogger(__name__)


class ContinuingTrainer(TerminatingTrainer):
    """A Trainer whose resumed training logs what the one that never stopped would have logged.

    Its data loaders draw from a generator of their own. The host's draw one number of the global one each time their
    workers start, which is once with persistent workers, and once more after resuming.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._last_grad_norm: torch.Tensor | float | None = None
        self._last_learning_rate: float | None = None
        self._evaluation_due = False
        super().__init__(*args, **kwargs)
        self._continuation = ResumeCallback(self)
        self.add_callback(self._continuation)

    def kept(self) -> dict[str, Any]:
        """What a checkpoint is to keep, as JSON has it. All processes call this together."""
        norm = self._last_grad_norm
        return {
            "loss": self.accelerator.gather(self._tr_loss.reshape(1)).mean().item(),
            "total_loss": self._total_loss_scalar,
            "first_step": self._continuation.first_step,
            "last_logged_step": self._globalstep_last_logged,
            "grad_norm": norm.item() if isinstance(norm, torch.Tensor) else norm,
            "learning_rate": self._last_learning_rate,
            "epoch_ended": self._continuation.epoch_ended,
            "evaluation_due": self._evaluation_due,
        }

    def restore_kept(self, kept: dict[str, Any]) -> None:
        """Take back what `kept` gave; called when a resumed training begins."""
        self._tr_loss.fill_(kept["loss"])
        self._total_loss_scalar = kept["total_loss"]
        self._continuation.first_step = kept["first_step"]
        self._globalstep_last_logged = kept["last_logged_step"]
        self._last_grad_norm, self._last_learning_rate = kept["grad_norm"], kept["learning_rate"]
        self._continuation.epoch_ended = kept["epoch_ended"]
        self._evaluation_due = kept["evaluation_due"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`; the mean loss of a whole training counts the steps before resuming too."""
        if "train_loss" in logs:
            steps = self.state.global_step - self._continuation.first_step
            logs["train_loss"] = self._total_loss_scalar / max(steps, 0.001)
            self._count_own_steps(logs)
        super().log(logs, start_time)

    def _count_own_steps(self, logs: dict[str, float]) -> None:
        """Correct the speeds of a resumed run, for which transformers 5.9 counts all steps of the schedule."""
        steps = self.state.global_step - self._continuation.resumed_at
        # With room for the rounding of what is logged.
        if logs["train_steps_per_second"] * logs["train_runtime"] > 1.01 * steps + 0.001 * logs["train_runtime"]:
            for name in ("train_samples_per_second", "train_steps_per_second"):
                logs[name] = round(logs[name] * steps / max(self.state.max_steps, 1), 3)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        return result._replace(training_loss=result.metrics["train_loss"])

    def finish_interrupted_step(self) -> None:
        """Evaluate, and end the epoch, if the training was interrupted right before that."""
        if self._evaluation_due:
            self.control.should_evaluate = self.control.should_save = True
            self._log_evaluate_and_save()
        state = self.state
        at_end = state.epoch == int(state.epoch or 0) or state.global_step >= state.max_steps
        if at_end and not self._continuation.epoch_ended:
            self.control = self.callback_handler.on_epoch_end(self.args, state, self.control)
            self._log_evaluate_and_save()

    def _log_evaluate_and_save(self) -> None:
        self._maybe_log_save_evaluate(
            self._tr_loss,
            self._last_grad_norm,
            self.model_wrapped,
            trial=None,
            epoch=self.state.epoch,
            ignore_keys_for_eval=None,
            start_time=time.time(),
            learning_rate=self._last_learning_rate,
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # The host looks behind a step only, and would train one more.
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _evaluate(self, *args: Any, skip_scheduler: bool = False, **kwargs: Any) -> dict[str, float]:
        # The evaluation of `eval_on_start`, which a resumed training has had.
        if skip_scheduler and self.state.global_step:
            return {}
        return super()._evaluate(*args, skip_scheduler=skip_scheduler, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        self._last_grad_norm, self._last_learning_rate = grad_norm, kwargs.get("learning_rate")
        # There may be no time for it; with save_strategy="best" the host would also save nothing after another.
        self._evaluation_due = self.terminated and self.control.should_evaluate
        if self._evaluation_due:
            self.control.should_evaluate = False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        drop_last = self.args.dataloader_drop_last
        # An evaluation counts every image.
        self.args.dataloader_drop_last = drop_last and kwargs.get("is_training", False)
        if draws_by_rank(self.args) and kwargs.get("sampler_fn") is not None:
            kwargs["sampler_fn"] = partial(self._common_sampler, kwargs["sampler_fn"])
        try:
            with common_seed(self.args):
                loader = super()._get_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last
        # accelerate's loaders pass on to one of torch's, or are one.
        own = getattr(loader, "base_dataloader", loader)
        own.generator = torch.Generator().manual_seed(self.args.seed)
        own.worker_init_fn = partial(ignore_sigterm_in_worker, and_then=own.worker_init_fn)
        return loader

    def _common_sampler(self, sampler_fn: Callable[[Dataset], Sampler | None], dataset: Dataset) -> Sampler | None:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return CommonSampler.wrap(sampler_fn(dataset), seed, lambda: int(self.state.epoch or 0))


class ResumeCallback(TrainerCallback):
    """Restores what a checkpoint kept when a training begins, and knows whether the epoch at hand was ended.

    Attributes:
        first_step: the step from which on losses are summed: 0, unless it was resumed from a checkpoint that did not
            keep the sum.
        resumed_at: the step from which this process trains.
        epoch_ended: whether the end of the epoch came since the last step.
    """

    def __init__(self, trainer: ContinuingTrainer) -> None:
        self.trainer = trainer
        self.first_step = 0
        self.resumed_at = 0
        self.epoch_ended = True

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.first_step = self.resumed_at = state.global_step
        self.epoch_ended = True
        kept = (state.stateful_callbacks.get(CALLBACK_STATE_KEY) or {}).get("kept")
        if kept is None:
            return
        self.trainer.restore_kept(kept)
        _relocate_best_checkpoint(args, state)
        self.trainer.finish_interrupted_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.epoch_ended = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.epoch_ended = True


def warn_about_newer_checkpoints(checkpoint: Path) -> None:
    """Name the complete checkpoints beyond the one that is resumed from, which `last` would take next time."""
    beside = list_checkpoints(checkpoint.parent)
    later = beside[: beside.index(checkpoint)] if checkpoint in beside else []
    later = [path.name for path in later if find_checkpoint_error(path) is None]
    if later:
        logger.warning(
            "Beyond %s, %s holds %s. What lies there is overwritten as the training reaches its steps: remove it if "
            "the training goes on with other settings, as resuming from the last checkpoint would take it.",
            checkpoint.name, checkpoint.parent, ", ".join(later),
        )  # fmt: skip


def _relocate_best_checkpoint(args: TrainingArguments, state: TrainerState) -> None:
    """The best checkpoint where the output folder is now: the state holds a path, and the folder may have moved."""
    best = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
    if best.is_dir():
        state.best_model_checkpoint = str(best)
