"""End all processes of a run with the error message of the process that failed.

A collective operation waits for all processes. If one of them has ended, the others wait until the timeout, or raise a
connection error. torchrun terminates them by SIGTERM, which a run takes as a request to save a checkpoint after the
current step. Therefore, a process that fails writes its message to the store of `torch.distributed`, and a thread of
each other process reads it.
"""

import atexit
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from .processes import is_distributed

FAILURE_KEY = "hf_tokenmixup/failure"
# Number of processes that have read the failure.
ACKNOWLEDGED_KEY = "hf_tokenmixup/failure_acknowledged"
POLL_INTERVAL_S = 0.5
# Maximum time that a process that failed waits for the other processes to read its message.
ACKNOWLEDGE_TIMEOUT_S = 5.0
# Time between reading a failure and exiting, so that the process that failed exits first.
EXIT_DELAY_S = 1.0
# Environment variable with the file of the error message that torchrun reports.
ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"


class PeerWatch:
    """`sys.excepthook` that reports an uncaught exception to the other processes, and ends this process if one fails.

    A program that catches its errors calls `report` before it exits. SIGTERM, Ctrl-C and a normal exit are not
    failures.

    Args:
        store: Store of the process group. Its connection must not be shared with another thread, since a waiting
            operation blocks the connection.
        rank: Rank of this process.
        world_size: Number of processes.
        previous_hook: `sys.excepthook` that is called first.
        exit_fn: Function that ends this process with an exit status.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        previous_hook: Callable[..., Any],
        exit_fn: Callable[[int], Any],
    ) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self._previous_hook, self._exit_fn = previous_hook, exit_fn
        self._stop = threading.Event()
        self._peer_failed = False
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def start(self) -> None:
        """Start the thread that reads failures of other processes."""
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Stop the thread. It must not use the store while the interpreter exits."""
        self._stop.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(ACKNOWLEDGE_TIMEOUT_S)

    def __call__(
        self, exc_type: type[BaseException], exc_value: BaseException, exc_traceback: TracebackType | None
    ) -> None:
        if self._peer_failed:
            # This exception is a consequence of the failure, such as a connection error.
            return
        self._previous_hook(exc_type, exc_value, exc_traceback)
        if not issubclass(exc_type, KeyboardInterrupt):
            self.report(f"{exc_type.__name__}: {exc_value}")

    def report(self, message: str, show: bool = False) -> None:
        """Report a failure of this process to the other processes, and wait until they have read it.

        Args:
            message: Error message of this process.
            show: Whether to print the message on stderr, unless another process has reported the same message.
        """
        message = " ".join(message.split())
        failure, first_failure = json.dumps([self.rank, message]), None
        with suppress(RuntimeError):
            first_failure = json.loads(self.store.compare_set(FAILURE_KEY, "", failure).decode())
        is_first = first_failure is None or first_failure[0] == self.rank
        if show and (is_first or first_failure[1] != message):
            print(message, file=sys.stderr, flush=True)
        self.stop()
        write_error_file(message)
        with suppress(RuntimeError):
            self.store.add(ACKNOWLEDGED_KEY, 1)
            deadline = time.monotonic() + ACKNOWLEDGE_TIMEOUT_S
            while is_first and self.store.add(ACKNOWLEDGED_KEY, 0) < self.world_size and time.monotonic() < deadline:
                time.sleep(0.05)

    def _watch(self) -> None:
        # The store raises a RuntimeError after the process that serves it has ended.
        with suppress(RuntimeError):
            while not self._stop.wait(POLL_INTERVAL_S):
                if self.store.check([FAILURE_KEY]):
                    rank, message = json.loads(self.store.get(FAILURE_KEY).decode())
                    self._exit_after_failure(rank, message)
                    return

    def _exit_after_failure(self, rank: int, message: str) -> None:
        """End this process because the process of this rank failed with this message."""
        if rank == self.rank or self._stop.is_set():
            return
        self._peer_failed = True
        print(f"Process {self.rank} ends, as process {rank} failed: {message}", file=sys.stderr, flush=True)
        with suppress(RuntimeError):
            self.store.add(ACKNOWLEDGED_KEY, 1)
        time.sleep(EXIT_DELAY_S)
        for worker in multiprocessing.active_children():
            worker.kill()
        sys.stdout.flush()
        self._exit_fn(1)


def watch_peers() -> None:
    """Set and start a `PeerWatch` if the run has several processes and this process has none yet."""
    if not is_distributed() or isinstance(sys.excepthook, PeerWatch):
        return
    store = _get_default_store()
    # torch 2.6 cannot clone the store.
    store = store.clone() if hasattr(store, "clone") else store
    watch = PeerWatch(store, dist.get_rank(), dist.get_world_size(), sys.excepthook, os._exit)
    sys.excepthook = watch
    watch.start()


def write_error_file(message: str) -> None:
    """Write the message that torchrun reports for this process. Without it, torchrun reports a missing traceback."""
    file = os.environ.get(ERROR_FILE_VARIABLE)
    if file and not Path(file).exists():
        with suppress(OSError):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
