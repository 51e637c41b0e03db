"""`TokenMixupCallback`: logs the metrics of TokenMixup in the Trainer of transformers."""

import math
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import unwrap_peft_model

from ..models import TokenMixupModelMixin
from .callbacks import EpochLogCallback
from .metrics import MixingMetrics, MixingTotals
from .mixing_warnings import MixingWarnings
from .trainer import TokenMixupTrainer


class TokenMixupCallback(EpochLogCallback):
    """Log the metrics of TokenMixup in a `transformers.Trainer`, with the values of `TokenMixupTrainer`.

    Each training loss in the log comes with the metrics of the steps since the last such line, see
    `summarize_mixing_metrics`. They are in `trainer.state.log_history`, are printed, and are reported to trackers such
    as TensorBoard. A line is also logged at the end of every epoch, unless `logging_strategy="no"`. The results of
    `train` have the fractions of the complete run (`train_mixed_fraction`, ...). Settings with which nothing is mixed
    are reported in a warning. The metrics are read from the device only when a line is logged. After resuming, they
    cover the steps since then.

    Example:
        trainer = Trainer(model, args, train_dataset=train_dataset)
        trainer.add_callback(TokenMixupCallback(trainer))
        trainer.train()
        model.to_plain_model().save_pretrained("outputs/plain")

    Args:
        trainer: The trainer that the callback is added to.

    Raises:
        ValueError: `trainer` is a `TokenMixupTrainer`, which logs the metrics itself. When training begins: the model
            is no TokenMixup model, or the trainer does not pass the labels to the model, so that no tokens are mixed:
            `label_smoothing_factor` is not 0, or `compute_loss_func` is set.
    """

    def __init__(self, trainer: Trainer) -> None:
        if isinstance(trainer, TokenMixupTrainer):
            raise ValueError(
                "TokenMixupTrainer logs the metrics of TokenMixup itself. Remove the TokenMixupCallback, or use the "
                "Trainer of transformers."
            )
        self.trainer = trainer
        self._metrics, self._totals = MixingMetrics(), MixingTotals()
        self._warnings = MixingWarnings(None)
        self._hook: RemovableHandle | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        model = unwrap_peft_model(self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False))
        _validate_labels_reach_model(self.trainer, model)
        # Trackers run before the callbacks of the user. They report the metrics only if these are added to the log
        # record earlier, so this callback becomes the first.
        handler = self.trainer.callback_handler
        handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]
        self._metrics, self._totals = MixingMetrics(), MixingTotals()
        self._warnings = MixingWarnings(
            model.config if model.config.tokenmixup_enabled and state.is_world_process_zero else None,
            math.ceil(state.max_steps / max(1, state.num_train_epochs)),
            can_have_partners=args.per_device_train_batch_size > 1,
            is_first=state.global_step == 0,
        )
        self._remove_hook()

        # A function, since a copy of the model would copy a bound method with the trainer.
        def add_metrics(module: nn.Module, inputs: Any, outputs: Any) -> None:
            if values := getattr(outputs, "mixing_metrics", None):
                self._metrics.update(values, len(outputs.logits))

        # The outermost wrapper: a hook of the model itself runs in the threads of DataParallel's replicas, and is
        # traced by `torch.compile`.
        self._hook = self.trainer.model_wrapped.register_forward_hook(add_metrics)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._metrics.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs,
    ):
        if self._hook is None or logs is None or not logs.keys() & {"loss", "train_loss"}:
            return
        totals = self._metrics.totals(self.trainer.accelerator)
        self._metrics = MixingMetrics()
        self._totals += totals
        self._warnings.add(totals)
        values = totals.summarize() if "loss" in logs else self._totals.run_metrics()
        logs.update(values)
        # The Trainer has stored a copy of `logs`.
        state.log_history[-1].update(values)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._remove_hook()

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _validate_labels_reach_model(trainer: Trainer, model: nn.Module) -> None:
    """Check that `trainer` passes labels to a TokenMixup model, since no tokens are mixed without them."""
    if not isinstance(model, TokenMixupModelMixin):
        raise ValueError(
            f"TokenMixupCallback needs a TokenMixup model, got a {type(model).__name__}. Load it with "
            "`hf_tokenmixup.load_classifier`, or remove the callback."
        )
    if not model.config.tokenmixup_enabled:
        return
    if trainer.label_smoother is not None:
        raise ValueError(
            f"No tokens would be mixed: `label_smoothing_factor` is {trainer.args.label_smoothing_factor}, and the "
            "Trainer of transformers then does not pass the labels to the model. Set `label_smoothing_factor=0`, or "
            "use TokenMixupTrainer, which smooths the labels before they are mixed."
        )
    if trainer.compute_loss_func is not None:
        raise ValueError(
            "No tokens would be mixed: with `compute_loss_func`, the Trainer of transformers does not pass the labels "
            "to the model. Remove it: the model computes its loss from the mixed labels."
        )
