"""SIGTERM, as a cluster sends it: the step at hand is finished, a checkpoint written, the training ended."""

import logging
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch.distributed
from torch.distributed.distributed_c10d import _get_default_store
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

STOP_KEY = "hf_tokenmixup/stop_at_step"

# How many steps a process may have given its accelerator that are not done yet.
MAX_STEPS_IN_FLIGHT = 2


def ignore_sigterm_in_worker(worker: int, and_then: Callable[[int], None] | None = None) -> None:
    """Have a data loader's worker heed a SIGTERM of its parent alone; to be called within it.

    Launchers and clusters often send it to all processes, and the training needs its workers to finish the step. This
    is for forked workers: others have threads that the signal may reach first, and end of it.
    """
    try:
        alone = len(os.listdir("/proc/self/task")) == 1
    except OSError:
        alone = False
    if alone and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parent_sigterm, args=(os.getppid(),), daemon=True).start()
    if and_then is not None:
        and_then(worker)


def _exit_on_parent_sigterm(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class TerminatingTrainer(Trainer):
    """A Trainer that SIGTERM ends behind the step at hand, with a checkpoint to resume from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._termination = PreemptionCallback()
        super().__init__(*args, **kwargs)
        if not self.args.enable_jit_checkpoint:
            self.add_callback(self._termination)

    @property
    def terminated(self) -> bool:
        """Whether the last training was ended by SIGTERM, with a checkpoint to resume from."""
        return self._termination.stopped

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in `Trainer`.

        Raises:
            SystemExit: SIGTERM ended a trial of a hyperparameter search, which would start the next trial otherwise.
        """
        try:
            result = super().train(resume_from_checkpoint, trial, *args, **kwargs)
        finally:
            # Callbacks do not hear of the end of a training that raises.
            self._termination.release()
        if self.terminated and trial is not None:
            raise SystemExit(128 + signal.SIGTERM)
        return result

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if not self.terminated:
            return super()._finalize_training(*args, **kwargs)
        # The host loads the best model, and with a limit of 1 removes every other checkpoint.
        settings = {"load_best_model_at_end": False, "save_total_limit": None}
        given = {name: getattr(self.args, name) for name in settings}
        try:
            vars(self.args).update(settings)
            return super()._finalize_training(*args, **kwargs)
        finally:
            vars(self.args).update(given)


class PreemptionCallback(TrainerCallback):
    """Save and stop behind the step in which SIGTERM came; with several processes, all of them behind the same one.

    They agree through the store that connects them, which no device waits for: who is told to stop names a step that
    nobody can have ended yet. On CPUs that is the next, as a step waits for the gradients of all processes. An
    accelerator is given work ahead: its steps are waited for :data:`MAX_STEPS_IN_FLIGHT` later, and one further back
    is named.

    Attributes:
        stopped: whether the last training ended so.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._asked = False
        self._installed = False
        self._previous: Any = None
        # Looked for before the training begins: later, the launcher may be gone.
        self._launcher = _find_launcher_pid()
        self._key = STOP_KEY
        self._unfinished: deque[torch.Event] = deque()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.stopped = self._asked = False
        self._unfinished.clear()
        if is_distributed():
            # Another for every training: the store outlives them.
            begun = _get_default_store().add(f"{STOP_KEY}/begun_by/{args.process_index}", 1)
            self._key = f"{STOP_KEY}/{begun}"
        # Python delivers signals to the main thread alone.
        if not self._installed and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._handle_sigterm)
            self._installed = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if not self._should_stop(state.global_step, args.device):
            return
        self.stopped = True
        control.should_save = control.should_training_stop = True
        logger.warning("SIGTERM: a checkpoint is written at step %d, and the training ends.", state.global_step)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.stopped:
            # The epoch is not at its end, or ends when the training is resumed.
            control.should_log = control.should_evaluate = control.should_save = False

    def release(self) -> None:
        """Give SIGTERM back to whom it went before."""
        if self._installed:
            # None: a handler that Python did not install.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._previous is None else self._previous)
            self._installed, self._previous = False, None

    def _handle_sigterm(self, number: int, frame: Any) -> None:
        self._asked = True

    def _should_stop(self, step: int, device: torch.device) -> bool:
        if self._launcher is not None and os.getppid() != self._launcher:
            self._asked = True
        if not is_distributed():
            return self._asked
        ahead = 0
        if device.type != "cpu":
            ahead = MAX_STEPS_IN_FLIGHT
            self._limit_steps_in_flight(device)
        store = _get_default_store()
        told = store.check([self._key])
        if self._asked and not told:
            # The first one to name a step has named it for all.
            store.compare_set(self._key, "", str(step + 1 + ahead))
        return told and step >= int(store.get(self._key))

    def _limit_steps_in_flight(self, device: torch.device) -> None:
        end = torch.Event(device)
        end.record()
        self._unfinished.append(end)
        if len(self._unfinished) > MAX_STEPS_IN_FLIGHT:
            self._unfinished.popleft().synchronize()


def _find_launcher_pid() -> int | None:
    """The `accelerate launch` that started this process. For a single one, SIGTERM ends it and is not passed on."""
    try:
        parent = psutil.Process(os.getppid())
        words = parent.cmdline()
    except psutil.Error:
        return None
    # After the interpreter and its options; what follows belongs to the script.
    is_accelerate = any(re.fullmatch(r"accelerate([.-].*)?", Path(word).name) for word in words[1:4])
    return parent.pid if is_accelerate else None


def is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
