"""SIGTERM, as a cluster sends it: the step at hand is finished, a checkpoint written, the training ended."""

import logging
import signal
import threading
from typing import Any

import torch.distributed
from torch.distributed.distributed_c10d import _get_default_store
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

STOP_KEY = "hf_tokenmixup/stop_at_step"


class TerminationCallback(TrainerCallback):
    """Save and stop behind the step in which SIGTERM came; with several processes, all of them behind the same one.

    They agree through the store that connects them, which no device waits for: who is told to stop names the next
    step, and nobody ends that step without having waited for the others' gradients.

    Attributes:
        stopped: whether the last training ended so.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._asked = False
        self._previous: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.stopped = self._asked = False
        # Python delivers signals to the main thread alone.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._ask)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if not self._stop_now(state.global_step):
            return
        self.stopped = True
        control.should_save = control.should_training_stop = True
        logger.warning("SIGTERM: a checkpoint is written at step %d, and the training ends.", state.global_step)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.stopped:
            # The epoch is not at its end, or ends when the training is resumed.
            control.should_log = control.should_evaluate = control.should_save = False

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True

    def _stop_now(self, step: int) -> bool:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self._asked
        store = _get_default_store()
        told = store.check([STOP_KEY])
        if self._asked and not told:
            store.set(STOP_KEY, str(step + 1))
        return told and step >= int(store.get(STOP_KEY))
