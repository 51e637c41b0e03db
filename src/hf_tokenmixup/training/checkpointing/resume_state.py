"""State that Trainer does not save but a resumed run needs to log the same values.

It is in the `trainer_state.json` of a checkpoint: the loss summed since the last log line and since the beginning, and
whether an evaluation or the end of an epoch was still to come when the checkpoint was saved.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .integrity import CALLBACK_STATE_KEY

if TYPE_CHECKING:
    from ..trainer import TokenMixupTrainer

logger = logging.getLogger(__name__)


class ResumeState(TrainerCallback):
    """The part of a run's state that Trainer does not save, so that a resumed run logs what an uninterrupted one does.

    It is restored when the resumed run begins. What the interrupted run still had to do after its last step, an
    evaluation or the end of the epoch, is then done first.

    Args:
        trainer: The trainer whose state it is.

    Attributes:
        first_step: The step after which losses are summed: 0, or the step of a checkpoint without this state.
        resumed_at: The step from which this process trains.
        epoch_ended: Whether the epoch ended after the last step.
        evaluation_due: Whether an evaluation was deferred to the resumed run.
        grad_norm: Gradient norm of the last step.
        learning_rate: Learning rate of the last step.
    """

    def __init__(self, trainer: "TokenMixupTrainer") -> None:
        self.first_step = 0
        self.resumed_at = 0
        self.epoch_ended = True
        self.evaluation_due = False
        self.grad_norm: torch.Tensor | float | None = None
        self.learning_rate: float | None = None
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values. A collective operation."""
        trainer, norm = self._trainer, self.grad_norm
        return {
            "loss": trainer.accelerator.gather(trainer._tr_loss.reshape(1)).mean().item(),
            "total_loss": trainer._total_loss_scalar,
            "first_step": self.first_step,
            "last_logged_step": trainer._globalstep_last_logged,
            "grad_norm": norm.item() if isinstance(norm, torch.Tensor) else norm,
            "learning_rate": self.learning_rate,
            "epoch_ended": self.epoch_ended,
            "evaluation_due": self.evaluation_due,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, when a resumed run begins."""
        trainer = self._trainer
        trainer._tr_loss.fill_(state["loss"])
        trainer._total_loss_scalar = state["total_loss"]
        trainer._globalstep_last_logged = state["last_logged_step"]
        self.first_step = state["first_step"]
        self.grad_norm, self.learning_rate = state["grad_norm"], state["learning_rate"]
        self.epoch_ended, self.evaluation_due = state["epoch_ended"], state["evaluation_due"]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.first_step = self.resumed_at = state.global_step
        self.epoch_ended = True
        saved = saved_state(state)
        if saved is None:
            return
        self._trainer.load_state_dict(saved)
        _relocate_best_checkpoint(args, state)
        self._finish_interrupted_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.epoch_ended = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.epoch_ended = True

    def correct_run_metrics(self, metrics: dict[str, float]) -> None:
        """Correct, in the metrics of a complete run, the mean loss and the speeds of a resumed run.

        The loss counts the steps before resuming too. For the speeds, transformers 5.9 counts all steps of the
        schedule.
        """
        state = self._trainer.state
        metrics["train_loss"] = self._trainer._total_loss_scalar / max(state.global_step - self.first_step, 0.001)
        steps = state.global_step - self.resumed_at
        # The margin is for the rounding of what is logged.
        if (
            metrics["train_steps_per_second"] * metrics["train_runtime"]
            > 1.01 * steps + 0.001 * metrics["train_runtime"]
        ):
            for name in ("train_samples_per_second", "train_steps_per_second"):
                metrics[name] = round(metrics[name] * steps / max(state.max_steps, 1), 3)

    def _finish_interrupted_step(self) -> None:
        """Evaluate, and end the epoch, if the run was interrupted right before that."""
        trainer = self._trainer
        if self.evaluation_due:
            trainer.control.should_evaluate = trainer.control.should_save = True
            self._log_evaluate_and_save()
        state = trainer.state
        at_end = state.epoch == int(state.epoch or 0) or state.global_step >= state.max_steps
        if at_end and not self.epoch_ended:
            trainer.control = trainer.callback_handler.on_epoch_end(trainer.args, state, trainer.control)
            self._log_evaluate_and_save()

    def _log_evaluate_and_save(self) -> None:
        trainer = self._trainer
        trainer._maybe_log_save_evaluate(
            trainer._tr_loss,
            self.grad_norm,
            trainer.model_wrapped,
            trial=None,
            epoch=trainer.state.epoch,
            ignore_keys_for_eval=None,
            start_time=time.time(),
            learning_rate=self.learning_rate,
        )


def saved_state(state: TrainerState) -> dict[str, Any] | None:
    """Return what a checkpoint has of `TokenMixupTrainer.state_dict`; None if it has none."""
    return (state.stateful_callbacks.get(CALLBACK_STATE_KEY) or {}).get("kept")


def _relocate_best_checkpoint(args: TrainingArguments, state: TrainerState) -> None:
    """Set the path of the best checkpoint to the current output folder, which may have been moved."""
    best = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
    if best.is_dir():
        state.best_model_checkpoint = str(best)
