"""A failed process ends the other processes with its message, in threads of one process and in two processes."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.commands import HANG_S
from torch.distributed import HashStore

from hf_tokenmixup.cli.program import exit_with
from hf_tokenmixup.training import peers
from hf_tokenmixup.training.peers import PeerWatch


@pytest.fixture
def pair(monkeypatch):
    """Two watches, the arguments of the hooks that they call, and the exit statuses."""
    monkeypatch.setattr(peers, "POLL_INTERVAL_S", 0.02)
    monkeypatch.setattr(peers, "EXIT_DELAY_S", 0.0)
    monkeypatch.setattr(peers, "ACKNOWLEDGE_TIMEOUT_S", HANG_S)
    store, shown, ended = HashStore(), [], []
    watches = [PeerWatch(store, rank, 2, lambda *error: shown.append(error), ended.append) for rank in range(2)]
    for watch in watches:
        watch._thread.start()
    yield watches, shown, ended
    for watch in watches:
        watch.stop()


def test_peers_uncaught_error_ends_other_process_with_message(pair, capsys):
    (first, second), shown, ended = pair
    second(ValueError, ValueError("image 3 is\n broken"), None)
    # The call returned after the other process had read the message.
    assert second.store.add(peers.ACKNOWLEDGED_KEY, 0) == 2
    first._thread.join(HANG_S)
    assert ended == [1] and [kind for kind, *_ in shown] == [ValueError]
    assert capsys.readouterr().err == "Process 0 ends, as process 1 failed: ValueError: image 3 is broken\n"
    # The connection error that follows in the other process is not printed.
    first(RuntimeError, RuntimeError("Connection closed by peer"), None)
    assert len(shown) == 1


def test_peers_same_error_in_both_processes_prints_once(pair, capsys):
    (first, second), _, ended = pair
    threads = [threading.Thread(target=watch.report, args=("finetune.py: no room", True)) for watch in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    text = capsys.readouterr().err
    assert text.count("no room") == 1 or ended == [1]


def test_peers_interruption_or_normal_exit_is_no_failure(pair):
    (first, second), shown, ended = pair
    second(KeyboardInterrupt, KeyboardInterrupt(), None)
    second.stop()
    time.sleep(0.1)
    assert first._thread.is_alive() and not ended and len(shown) == 1


def test_peers_missing_store_ends_watch_only(pair):
    (first, _), _, ended = pair

    class Gone:
        def check(self, keys):
            raise RuntimeError("Connection was likely closed")

    first.store = Gone()
    first._thread.join(HANG_S)
    assert not first._thread.is_alive() and not ended


def test_peers_failure_is_reported_by_torchrun(pair, tmp_path, monkeypatch):
    (_, second), *_ = pair
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    second.report("finetune.py: no room", show=True)
    assert json.loads((tmp_path / "0" / "error.json").read_text())["message"] == "finetune.py: no room"


def test_peers_exit_with_reports_line(pair, monkeypatch, capsys):
    (first, second), _, ended = pair
    monkeypatch.setattr(sys, "excepthook", second)
    monkeypatch.setattr(sys, "argv", ["finetune.py"])
    with pytest.raises(SystemExit) as exited:
        exit_with(ValueError("no\nroom"))
    first._thread.join(HANG_S)
    assert exited.value.code == 1 and ended == [1]
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "Process 0 ends, as process 1 failed: finetune.py: no room",
        "finetune.py: no room",
    ]


TRAINING = """
import os, sys, time
from helpers.tiny_training import Images, tokenmixup_vit
from transformers import TrainerCallback
from hf_tokenmixup.training import TokenMixupTrainer, TokenMixupTrainingArguments, peers

# On a busy machine, the other process may need more than 5 seconds to read a failure.
peers.ACKNOWLEDGE_TIMEOUT_S = 600.0
folder, place = sys.argv[1:]
args = TokenMixupTrainingArguments(folder, use_cpu=True, report_to="none", max_steps=5, save_strategy="no",
    per_device_train_batch_size=4, disable_tqdm=True)
print("pid", os.getpid(), flush=True)

def fail(where):
    if where == place and args.process_index == 1:
        print("failing", flush=True)
        raise ValueError("image 3 is broken")

class Callback(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            fail("step")
            if place == "stuck" and args.process_index == 1:
                raise ValueError("image 3 is broken")
            if place == "stuck":
                time.sleep(1800)

with args.main_process_first():
    fail("data")
trainer = TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(32), callbacks=[Callback()])
trainer.train()
# One write: the lines of two processes may interleave otherwise.
print(f"trained {trainer.state.global_step}\\n", end="", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["data", "step", "stuck", "nowhere"])
def test_peers_two_processes_end_together(tmp_path, place):
    (tmp_path / "run.py").write_text(TRAINING)
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(tmp_path / "run.py"), str(tmp_path / "out"), place],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}, capture_output=True, text=True, timeout=HANG_S,
    )  # fmt: skip
    print(done.stdout, done.stderr)
    if place == "nowhere":
        assert done.returncode == 0 and done.stdout.count("trained 5") == 2 and "failed" not in done.stderr
        return
    assert done.returncode == 1 and "trained" not in done.stdout
    assert "Process 0 ends, as process 1 failed: ValueError: image 3 is broken" in done.stderr
    # torchrun reports the message too, and no connection error.
    assert "traceback : ValueError: image 3 is broken" in done.stderr and "Connection closed" not in done.stderr
    for word in ("SIGKILL", "forcefully"):
        assert word not in done.stderr
