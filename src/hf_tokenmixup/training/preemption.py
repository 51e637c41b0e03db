"""Preemption: on SIGTERM, or after `max_time`, finish the current step, save a checkpoint and stop."""

import logging
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch.distributed
from torch.distributed.distributed_c10d import _get_default_store
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

STOP_KEY = "hf_tokenmixup/stop_at_step"

# How many steps of a process may be queued on its accelerator.
MAX_STEPS_IN_FLIGHT = 2


# In seconds; tests replace it.
_now = time.monotonic


def ignore_sigterm_in_worker(worker: int, worker_init_fn: Callable[[int], None] | None = None) -> None:
    """Make a DataLoader worker ignore SIGTERM unless its parent sent it. Call it inside the worker.

    Launchers and clusters often send SIGTERM to all processes, and the run needs its workers to finish the step. Only
    forked workers are changed: others have threads that may receive the signal first.

    Args:
        worker: Index of the worker.
        worker_init_fn: Called with the index afterwards.
    """
    try:
        alone = len(os.listdir("/proc/self/task")) == 1
    except OSError:
        alone = False
    if alone and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parent_sigterm, args=(os.getppid(),), daemon=True).start()
    if worker_init_fn is not None:
        worker_init_fn(worker)


def _exit_on_parent_sigterm(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class PreemptionCallback(TrainerCallback):
    """Save a checkpoint and stop after the step in which SIGTERM is received, in all processes after the same step.

    The same happens `max_time` minutes after the run began, unless the run is complete.

    Processes agree through the store of `torch.distributed`, so that no device synchronizes. The first process that
    has to stop publishes a stop step that no process can have finished yet. On CPUs that is the next step, as a step
    waits for the gradients of all processes. An accelerator has up to `MAX_STEPS_IN_FLIGHT` steps queued, and the stop
    step is later by as many.

    Attributes:
        preempted: Whether SIGTERM or `max_time` ended the last run.
        timed_out: Whether it was `max_time`, as far as this process has received no SIGTERM.
    """

    def __init__(self) -> None:
        self.preempted = self.timed_out = False
        self._sigterm_received = False
        self._deadline: float | None = None
        self._installed = False
        self._previous: Any = None
        # Found before training begins: later, the launcher may be gone.
        self._launcher = _find_launcher_pid()
        self._key = STOP_KEY
        self._unfinished: deque[torch.Event] = deque()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.preempted = self.timed_out = self._sigterm_received = False
        max_time = getattr(args, "max_time", None)
        self._deadline = None if max_time is None else _now() + 60 * max_time
        self._unfinished.clear()
        if is_distributed():
            # One key for each run: the store outlives them.
            begun = _get_default_store().add(f"{STOP_KEY}/begun_by/{args.process_index}", 1)
            self._key = f"{STOP_KEY}/{begun}"
        # Python delivers signals to the main thread alone.
        if not self._installed and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._handle_sigterm)
            self._installed = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        # A run that is complete ends by itself.
        time_is_up = self._deadline is not None and _now() >= self._deadline and state.global_step < state.max_steps
        if not self._should_stop(state.global_step, args.device, time_is_up):
            return
        self.preempted = True
        self.timed_out = self._deadline is not None and not self._sigterm_received
        control.should_save = control.should_training_stop = True
        reason = "`max_time` is over" if self.timed_out else "Received SIGTERM"
        logger.warning("%s: saving a checkpoint at step %d and stopping.", reason, state.global_step)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.preempted:
            # The epoch is not complete, or it is completed when the run is resumed.
            control.should_log = control.should_evaluate = control.should_save = False

    def restore_signal_handler(self) -> None:
        """Restore the handler that SIGTERM had before the run."""
        if self._installed:
            # None: a handler that Python did not install.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._previous is None else self._previous)
            self._installed, self._previous = False, None

    def _handle_sigterm(self, number: int, frame: Any) -> None:
        self._sigterm_received = True

    def _should_stop(self, step: int, device: torch.device, time_is_up: bool = False) -> bool:
        if self._launcher is not None and os.getppid() != self._launcher:
            self._sigterm_received = True
        requested = self._sigterm_received or time_is_up
        if not is_distributed():
            return requested
        ahead = 0
        if device.type != "cpu":
            ahead = MAX_STEPS_IN_FLIGHT
            self._limit_steps_in_flight(device)
        store = _get_default_store()
        stop_requested = store.check([self._key])
        if requested and not stop_requested:
            # The first process that sets a step sets it for all.
            store.compare_set(self._key, "", str(step + 1 + ahead))
        return stop_requested and step >= int(store.get(self._key))

    def _limit_steps_in_flight(self, device: torch.device) -> None:
        end = torch.Event(device)
        end.record()
        self._unfinished.append(end)
        if len(self._unfinished) > MAX_STEPS_IN_FLIGHT:
            self._unfinished.popleft().synchronize()


def _find_launcher_pid() -> int | None:
    """Return the process id of the `accelerate launch` that started this process; it does not pass SIGTERM on."""
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
