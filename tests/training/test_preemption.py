"""SIGTERM in the middle of a training: the step is finished, saved, and gone on from bit for bit."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers.commands import HANG_S
from helpers.tiny_training import Images, tokenmixup_vit
from torch.distributed import HashStore
from transformers import TrainerCallback

from hf_tokenmixup.training import TokenMixupTrainer
from hf_tokenmixup.training import preemption as termination
from hf_tokenmixup.training.preemption import PreemptionCallback, ignore_sigterm_in_worker


class Terminating(Images):
    """Sends SIGTERM to this process when an image is read for the n-th time."""

    def __init__(self, size, after):
        super().__init__(size)
        self.after = after

    def __getitem__(self, index):
        self.after -= 1
        if self.after == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


def test_preemption_saves_stops_and_resumes_as_uninterrupted(arguments, tmp_path):
    settings = {"max_steps": 8, "logging_steps": 1, "learning_rate": 0.01}
    complete = TokenMixupTrainer(tokenmixup_vit(), arguments(**settings), train_dataset=Images(16))
    complete.train()
    assert not complete.terminated

    before = signal.getsignal(signal.SIGTERM)
    args = arguments(**settings, output_dir=str(tmp_path / "parts"))
    trainer = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Terminating(16, 4 * 2 + 2))
    trainer.train()
    assert trainer.terminated and signal.getsignal(signal.SIGTERM) is before
    (checkpoint,) = (tmp_path / "parts").glob("checkpoint-*")
    assert int(checkpoint.name.rpartition("-")[2]) == trainer.state.global_step < 5

    resumed = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(16))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8 and not resumed.terminated
    for name, tensor in complete.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


class Clock(TrainerCallback):
    """A clock that advances by a minute in each step."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds

    def on_step_begin(self, args, state, control, **kwargs):
        self.seconds += 60


def test_max_time_stops_in_pieces_that_equal_an_unbroken_run(arguments, tmp_path, monkeypatch):
    settings = {"max_steps": 8, "logging_steps": 1, "learning_rate": 0.01}
    complete = TokenMixupTrainer(tokenmixup_vit(), arguments(**settings), train_dataset=Images(16))
    complete.train()
    assert not complete.timed_out

    clock = Clock()
    monkeypatch.setattr(termination, "_now", clock)
    args = arguments(**settings, output_dir=str(tmp_path / "parts"), max_time=3.0, resume_from_checkpoint="auto")
    stopped = []
    # After steps 3 and 6, which are within epochs of four steps. The last piece has two steps.
    for _ in range(3):
        piece = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(16), callbacks=[clock])
        piece.train(resume_from_checkpoint="auto")
        stopped.append((piece.state.global_step, piece.terminated, piece.timed_out))
    assert stopped == [(3, True, True), (6, True, True), (8, False, False)]
    for name, tensor in complete.model.state_dict().items():
        assert torch.equal(tensor, piece.model.state_dict()[name]), name
    losses = [[line["loss"] for line in run.state.log_history if "loss" in line] for run in (complete, piece)]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_max_time_at_the_last_step_completes_the_run(arguments, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(termination, "_now", clock)
    args = arguments(max_steps=2, max_time=2.0)
    trainer = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(8), callbacks=[clock])
    trainer.train()
    assert trainer.state.global_step == 2 and not trainer.terminated and not trainer.timed_out


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("inf"), float("nan")])
def test_max_time_out_of_range_raises(arguments, minutes):
    with pytest.raises(ValueError, match="`max_time` must be a finite number of minutes above 0, got"):
        arguments(max_time=minutes)


def test_preemption_does_not_end_epoch(arguments):
    """Neither an evaluation, for which there is no time, nor a line of the log that a resumed training had twice."""
    args = arguments(
        max_steps=-1, num_train_epochs=2, eval_strategy="epoch", logging_strategy="epoch", save_strategy="epoch"
    )
    settings = {"eval_dataset": torch.utils.data.Subset(Images(4), range(4))}
    trainer = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Terminating(16, 4 * 2 + 2), **settings)
    trainer.train()
    assert trainer.terminated and trainer.state.global_step < 4
    assert not any("eval_loss" in line or "loss" in line for line in trainer.state.log_history)
    resumed = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(16), **settings)
    resumed.train(resume_from_checkpoint=True)
    steps = [line["step"] for line in resumed.state.log_history]
    assert steps == [4, 4, 8, 8, 8]


def test_preemption_in_other_thread_trains(arguments):
    trainer = TokenMixupTrainer(tokenmixup_vit(), arguments(), train_dataset=Images(4))
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1 and not trainer.terminated


class TerminateAt(TrainerCallback):
    """Sends SIGTERM to this process when a step begins."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def worse_and_worse():
    """Metrics of which the first are the best."""
    scores = iter(range(100, 0, -1))
    return lambda prediction: {"top1": next(scores) / 100}


WITH_BEST = {"max_steps": 12, "eval_strategy": "steps", "metric_for_best_model": "top1", "greater_is_better": True}


@pytest.mark.parametrize("strategy, steps, stopped", [("steps", 2, 5), ("best", 3, 6)])
def test_preemption_defers_evaluation_to_resumed_run(arguments, strategy, steps, stopped):
    """Beside a best checkpoint and a limit of 1; where an evaluation is due, which may say that nothing is saved."""
    args = arguments(
        **WITH_BEST, save_strategy=strategy, save_steps=steps, eval_steps=steps, save_total_limit=1,
        load_best_model_at_end=True,
    )  # fmt: skip
    data = {"train_dataset": Images(16), "eval_dataset": Images(8)}
    options = data | {"compute_metrics": worse_and_worse()}
    trainer = TokenMixupTrainer(tokenmixup_vit(), args, callbacks=[TerminateAt(stopped - 1)], **options)
    trainer.train()
    assert trainer.terminated and trainer.state.global_step == stopped
    assert (args.save_total_limit, args.load_best_model_at_end) == (1, True)
    left = {path.name for path in Path(args.output_dir).glob("checkpoint-*")}
    assert left == {f"checkpoint-{steps}", f"checkpoint-{stopped}"}

    resumed = TokenMixupTrainer(tokenmixup_vit(), args, **options)
    resumed.train(resume_from_checkpoint=True)
    evaluated = [line["step"] for line in resumed.state.log_history if "eval_loss" in line]
    assert evaluated == list(range(steps, 13, steps))


def test_preemption_restores_signal_handler_after_error(arguments):
    class Broken(Images):
        def __getitem__(self, index):
            raise RuntimeError("broken")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="broken"):
        TokenMixupTrainer(tokenmixup_vit(), arguments(), train_dataset=Broken(4)).train()
    assert signal.getsignal(signal.SIGTERM) is before


def test_preemption_processes_ahead_of_devices_stop_after_same_step(monkeypatch):
    """B may have ended step s + 2 when A ends s, not more: its device waits for A's gradients."""

    class Event:
        def __init__(self, device):
            self.done = False

        def record(self):
            events.append(self)

        def synchronize(self):
            self.done = True

    events, store = [], HashStore()
    monkeypatch.setattr(termination, "is_distributed", lambda: True)
    monkeypatch.setattr(termination, "_get_default_store", lambda: store)
    monkeypatch.setattr(torch, "Event", Event)
    device = torch.device("cuda")
    for asked in ("A", "B", "AB"):
        for lead in range(termination.MAX_STEPS_IN_FLIGHT + 1):
            callbacks = {name: PreemptionCallback() for name in "AB"}
            for callback in callbacks.values():
                callback._key = f"{asked}/{lead}"
            stops = {}
            for step in range(1, 30):
                for name, at in (("B", step + lead), ("A", step)):
                    callbacks[name]._sigterm_received = name in asked and at >= 7
                    if name not in stops and callbacks[name]._should_stop(at, device):
                        stops[name] = at
            assert stops["A"] == stops["B"] > 7, (asked, lead, stops)
    assert [event.done for event in events[:4]] == [True, True, True, True]


IN_A_GROUP = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_preemption import TerminateAt
from helpers.tiny_training import Images, tokenmixup_vit
from hf_tokenmixup.training import TokenMixupTrainer, TokenMixupTrainingArguments

class All(TerminateAt):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.killpg(os.getpgrp(), signal.SIGTERM)

args = TokenMixupTrainingArguments(sys.argv[2], use_cpu=True, report_to="none", max_steps=50, save_strategy="no",
    dataloader_num_workers=2, per_device_train_batch_size=4, disable_tqdm=True)
trainer = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(16), callbacks=[All(2)])
trainer.train()
print("terminated", trainer.terminated, trainer.state.global_step)
"""


def test_preemption_sigterm_to_process_group_keeps_workers_alive(tmp_path):
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", IN_A_GROUP, paths[0], str(tmp_path / "out")],
        capture_output=True, text=True, timeout=HANG_S, start_new_session=True, env=environment,
    )  # fmt: skip
    assert "terminated True 3" in done.stdout, done.stderr[-2000:]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-3"]


def test_ignore_sigterm_in_worker_ends_on_sigterm_of_parent():
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def wait(worker):
        # One that never comes to an end by itself.
        while True:
            there.send(there.recv())

    worker = context.Process(target=lambda: ignore_sigterm_in_worker(0, worker_init_fn=wait))
    worker.start()
    here.send("ready")
    assert here.recv() == "ready"
    # Sent by another process than its parent.
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    while is_pending(signal.SIGTERM, worker.pid):
        time.sleep(0.01)
    here.send("alive")
    assert here.recv() == "alive"
    worker.terminate()
    worker.join()
    assert worker.exitcode == 0


def is_pending(number, process):
    """Whether a signal to a process was not taken yet."""
    (pending,) = re.findall(r"^ShdPnd:\s*(\w+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return int(pending, 16) >> (number - 1) & 1


@pytest.mark.parametrize(
    "command, found",
    [
        ("python /venv/bin/accelerate launch scripts/finetune.py", True),
        ("python /venv/bin/accelerate-launch scripts/finetune.py", True),
        ("python -m accelerate.commands.launch scripts/finetune.py", True),
        ("python -m torch.distributed.run scripts/finetune.py", False),
        ("bash accelerated", False),
    ],
)
def test_find_launcher_pid_of_accelerate_is_found(monkeypatch, command, found):
    """The launcher may be gone when training begins: SIGTERM ends accelerate, which passes nothing on."""

    class Parent:
        pid = os.getppid()

        def __init__(self, pid):
            assert pid == self.pid

        def cmdline(self):
            return command.split()

    monkeypatch.setattr(psutil, "Process", Parent)
    callback = PreemptionCallback()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert callback._should_stop(1, torch.device("cpu")) is found
