"""When one process of a run fails, the others end too, with its message.

A collective operation waits for all processes. With one of them gone, the others wait for its timeout, or end with an
error of the connection. torchrun stops them by SIGTERM, which a training run takes for a request to write a checkpoint
after the current step. Here, the process that fails leaves its message in the store that connects the processes, and
a thread in each of the others looks for it.
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

from .processes import connected

FAILURE_KEY = "hf_tokenmixup/failure"
SEEN_KEY = "hf_tokenmixup/failure_seen"
# Seconds between two looks at the store; for the others to have seen a failure; and between seeing it and the end, in
# which the process that failed ends first.
POLL_S, SEEN_S, END_S = 0.5, 5.0, 1.0
# Where torchrun looks for the message that its own report shows.
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


class PeerWatch:
    """Reports the failure of this process to the others of its run, and ends it when another one fails.

    It is a `sys.excepthook`: an exception that nothing catches is a failure. A program that catches its errors and
    ends with a message calls `report`. SIGTERM, Ctrl-C, and an ordinary end are no failures.

    Args:
        store: That of the processes, without the connection of another thread: an operation that waits blocks it.
        rank: Of this process.
        world: How many processes there are.
        hook: The `sys.excepthook` to be called first.
        end: Called with a status to end the process.
    """

    def __init__(
        self, store: dist.Store, rank: int, world: int, hook: Callable[..., Any], end: Callable[[int], Any]
    ) -> None:
        self.store, self.rank, self.world = store, rank, world
        self._hook, self._end = hook, end
        self._stop = threading.Event()
        self._over = False
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def start(self) -> None:
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Look no longer. At the end of the interpreter, a thread must not be inside the store."""
        self._stop.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(SEEN_S)

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if self._over:
            # Another process failed first, and this error comes from the connection to it.
            return
        self._hook(kind, error, trace)
        if not issubclass(kind, KeyboardInterrupt):
            self.report(f"{kind.__name__}: {error}")

    def report(self, message: str, show: bool = False) -> None:
        """Leave a message to the other processes, and wait until they have seen it.

        Args:
            message: Of the error that ends this process.
            show: Print it on stderr, unless another process has printed the same.
        """
        message = " ".join(message.split())
        first = None
        with suppress(RuntimeError):
            first = json.loads(self.store.compare_set(FAILURE_KEY, "", json.dumps([self.rank, message])).decode())
        own = first is None or first[0] == self.rank
        if show and (own or first[1] != message):
            print(message, file=sys.stderr, flush=True)
        self.stop()
        write_error_file(message)
        with suppress(RuntimeError):
            self.store.add(SEEN_KEY, 1)
            deadline = time.monotonic() + SEEN_S
            while own and self.store.add(SEEN_KEY, 0) < self.world and time.monotonic() < deadline:
                time.sleep(0.05)

    def _watch(self) -> None:
        # A RuntimeError: the store is gone, as at the end of the process that has it.
        with suppress(RuntimeError):
            while not self._stop.wait(POLL_S):
                if self.store.check([FAILURE_KEY]):
                    self._follow(*json.loads(self.store.get(FAILURE_KEY).decode()))
                    return

    def _follow(self, rank: int, message: str) -> None:
        if rank == self.rank or self._stop.is_set():
            return
        self._over = True
        print(f"Process {self.rank} ends, as process {rank} failed: {message}", file=sys.stderr, flush=True)
        with suppress(RuntimeError):
            self.store.add(SEEN_KEY, 1)
        time.sleep(END_S)
        for worker in multiprocessing.active_children():
            worker.kill()
        sys.stdout.flush()
        self._end(1)


def watch_peers() -> None:
    """Begin to watch the other processes of this run, if there are any and nothing watches them yet."""
    if not connected() or isinstance(sys.excepthook, PeerWatch):
        return
    store = _get_default_store()
    # torch 2.6 cannot make another connection.
    store = store.clone() if hasattr(store, "clone") else store
    watch = PeerWatch(store, dist.get_rank(), dist.get_world_size(), sys.excepthook, os._exit)
    sys.excepthook = watch
    watch.start()


def write_error_file(message: str) -> None:
    """Have torchrun's report show this message, where it would show that there is no traceback."""
    file = os.environ.get(ERROR_FILE)
    if file and not Path(file).exists():
        with suppress(OSError):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
