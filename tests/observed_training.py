"""scripts/finetune.py in a process that announces its moments and, at one of them, kills itself or sends a signal.

  python tests/observed_training.py ORDER.json scripts/finetune.py OPTIONS

Without arguments, it imports everything once and reads lines of JSON, `[order, arguments, output]`. It forks a process
for each and prints the exit status.

A moment is a phase and what happens in it: a step begins, a batch is evaluated, a file of a checkpoint is complete or
is about to be removed. The process acts between two of its own instructions, so the speed of the machine is
irrelevant.
"""

import builtins
import faulthandler
import io
import json
import os
import re
import runpy
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.backends.backend_agg  # noqa: F401  imported before the forks, like the imports below
import psutil
import safetensors.torch
import torch
from helpers.commands import HANG_S
from transformers import TrainerCallback

import hf_tokenmixup.cli.finetune  # noqa: F401
from hf_tokenmixup.training import TokenMixupTrainer

LOG = "training_log.jsonl"


class Moment(NamedTuple):
    phase: str
    what: str


class Order(NamedTuple):
    """Instructions for a process.

    Attributes:
        folder: output folder of the observed run; files in other folders are not observed.
        events: file to which each moment is appended as JSON: phase, event and time.
        at: the moment to act at; None: never.
        number: occurrence of the moment to act at, from 1.
        fraction: fraction of the file written at that moment that remains, in [0, 1].
        action: one of `ACTIONS`.
        rank: rank of the observed process.
    """

    folder: str
    events: str
    at: Moment | None = None
    number: int = 1
    fraction: float = 1.0
    action: str = "kill"
    rank: int = 0


class Observer(TrainerCallback):
    """Announces the moments of this process and acts at the moment of its order."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.folder = os.path.abspath(order.folder)
        self.at = None if order.at is None else Moment(*order.at)
        self.events = os.open(order.events, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.seen: Counter[Moment] = Counter()
        self.evaluation = "evaluation"

    def announce(self, phase: str, what: str, truncate: Callable[[], None] | None = None) -> None:
        """Announce a moment; `truncate` removes the end of a file, as if the process had ended while writing."""
        moment = Moment(phase, what)
        os.write(self.events, (json.dumps([*moment, time.time()]) + "\n").encode())
        self.seen[moment] += 1
        if moment == self.at and self.seen[moment] == self.order.number:
            if truncate is not None:
                truncate()
            ACTIONS[self.order.action]()

    def moment_of(self, file: Any) -> Moment | None:
        """Return the moment at which `file` is written; None if it is outside of the output folder."""
        if not isinstance(file, str | os.PathLike):
            return None
        path = os.path.abspath(os.fspath(file))
        if not path.startswith(self.folder + os.sep):
            return None
        name = os.path.relpath(path, self.folder)
        if found := re.match(r"checkpoint-\d+/(.*)", name):
            return Moment("checkpoint", found[1])
        results = name.endswith(("_results.json", "trainer_state.json", "README.md"))
        return Moment("log" if name == LOG else "results" if results else "publishing", name)

    def written(self, file: Any, before: int = 0) -> None:
        """Announce that a file is complete; its first `before` bytes existed before."""
        moment = self.moment_of(file)
        if moment is not None:
            size = before + int(self.order.fraction * (os.path.getsize(file) - before))
            self.announce(*moment, truncate=lambda: os.truncate(file, size))

    def audit(self, event: str, arguments: tuple) -> None:
        if event in ("os.remove", "os.rmdir"):
            path, descriptor = arguments
            if descriptor != -1:
                path = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), path)
            path = os.path.abspath(path)
            found = re.fullmatch(r"checkpoint-\d+(/.*)?", os.path.relpath(path, self.folder))
            if found:
                self.announce("removal", (found[1] or "/folder")[1:])

    def on_train_end(self, args, state, control, **kwargs):
        self.evaluation = "final evaluation"

    def on_step_begin(self, args, state, control, **kwargs):
        self.announce("training", "step begins")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.announce("training", "gradients")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.announce("training", "weights")

    def on_step_end(self, args, state, control, **kwargs):
        self.announce("training", "step ends")

    def on_evaluate(self, args, state, control, **kwargs):
        self.announce(self.evaluation, "metrics")

    def on_prediction_step(self, args, state, control, **kwargs):
        self.announce(self.evaluation, "batch")


class WrittenFile:
    """An open file that announces when it is closed."""

    def __init__(self, file: Any, path: Any, before: int, observer: Observer) -> None:
        self._file, self._path, self._before, self._observer = file, path, before, observer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "WrittenFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
            self._observer.written(self._path, self._before)


def observe(observer: Observer) -> None:
    """Announce each written or removed file and the steps of each new trainer in this process."""
    serialize_file, save, open_file = safetensors.torch.serialize_file, torch.save, io.open

    @wraps(serialize_file)
    def announced_serialize_file(tensors, filename, *args, **kwargs):
        serialize_file(tensors, filename, *args, **kwargs)
        observer.written(filename)

    @wraps(save)
    def announced_save(what, f, *args, **kwargs):
        save(what, f, *args, **kwargs)
        observer.written(f)

    @wraps(open_file)
    def announced_open(file, mode="r", *args, **kwargs):
        if not set(mode) & set("wax+") or observer.moment_of(file) is None:
            return open_file(file, mode, *args, **kwargs)
        before = os.path.getsize(file) if "a" in mode and os.path.exists(file) else 0
        return WrittenFile(open_file(file, mode, *args, **kwargs), file, before, observer)

    safetensors.torch.serialize_file, torch.save = announced_serialize_file, announced_save
    builtins.open = io.open = announced_open
    sys.addaudithook(observer.audit)

    def after(name: str, announce: Callable[[Any], Any]) -> None:
        method = getattr(TokenMixupTrainer, name)

        @wraps(method)
        def announced(self, *args, **kwargs):
            result = method(self, *args, **kwargs)
            announce(self)
            return result

        setattr(TokenMixupTrainer, name, announced)

    def trainer_is_built(trainer: TokenMixupTrainer) -> None:
        trainer.add_callback(observer)
        observer.announce("start-up", "trainer")

    after("__init__", trainer_is_built)
    after("_load_from_checkpoint", lambda trainer: observer.announce("start-up", "weights"))
    after("_load_optimizer_and_scheduler", lambda trainer: observer.announce("start-up", "optimizer"))
    after("_load_best_model", lambda trainer: observer.announce("publishing", "best model"))


def terminate_launcher(generations: int = 1) -> None:
    """Send SIGTERM to an ancestor; return when the parent has ended or this process receives SIGTERM."""
    parent, received = os.getppid(), []
    launcher = psutil.Process().parents()[generations - 1].pid
    previous = signal.getsignal(signal.SIGTERM)

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        if callable(previous):
            previous(number, frame)

    signal.signal(signal.SIGTERM, receive)
    os.kill(launcher, signal.SIGTERM)
    while not received and os.getppid() == parent:
        time.sleep(0.01)
    signal.signal(signal.SIGTERM, previous)


ACTIONS = {
    "kill": lambda: os.killpg(os.getpgrp(), signal.SIGKILL),
    "interrupt": lambda: os.killpg(os.getpgrp(), signal.SIGINT),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "terminate launcher": terminate_launcher,
    "terminate study": lambda: terminate_launcher(2),
}


def run(order: dict, arguments: list[str]) -> None:
    """Run a script, or a module after `-m`, with its arguments as the main program of this process."""
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    if order["folder"] in arguments and int(os.environ.get("RANK", 0)) == order.get("rank", 0):
        observer = Observer(Order(**order))
        observe(observer)
        observer.announce("start-up", "imports")
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(sys.argv[0], run_name="__main__")


def serve() -> None:
    for line in sys.stdin:
        order, arguments, output = json.loads(line)
        process = os.fork()
        if not process:
            os.setsid()
            for descriptor, file in enumerate(("/dev/null", output, output)):
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT if descriptor else os.O_RDONLY
                os.dup2(os.open(file, flags, 0o644), descriptor)
            return run(order, arguments)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        run(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2:])
    else:
        serve()
