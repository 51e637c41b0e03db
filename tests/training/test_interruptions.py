"""A run of scripts/finetune.py that a signal ends: SIGTERM, Ctrl-C, and SIGKILL at each of its moments.

The signals are sent from within the run, at a given moment (see `observed_training.py`), so that no test depends on
how fast the machine is.
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import HANG_S, SCRIPTS
from kill_and_resume import (
    AT_THE_END,
    DATA,
    FROM_SCRATCH,
    OBSERVED,
    RESUMING,
    WHILE_TRAINING,
    differences,
    kill_and_resume,
    plan,
)
from observed_training import Moment, Order
from safetensors.torch import load_file

from hf_tokenmixup.training.checkpointing.integrity import find_checkpoint_error

SCRIPT = SCRIPTS / "finetune.py"
OPTIONS = [*DATA, *FROM_SCRATCH, "--eval_split", "test", "--do_train", "--save_strategy", "no", "--logging_steps", "1"]
OPTIONS += "--use_cpu --report_to none --disable_tqdm true --per_device_train_batch_size 8".split()
OPTIONS += "--horizontal_layers 1 --horizontal_tau none --horizontal_rho 0 --vertical_layers 2".split()
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
STEP_BEGINS = Moment("training", "step begins")


def observed(folder, **order):
    """The words of a script that acts at a moment."""
    file = folder.with_suffix(".json")
    file.write_text(json.dumps(Order(str(folder), str(folder.with_suffix(".events")), **order)._asdict()))
    return [OBSERVED, file]


def launch(*words, check=False):
    """Run a program of this environment; return when all its processes have ended."""
    program, *words = map(str, words)
    command = [str(Path(sys.executable).with_name(program)), *words]
    # A process that outlives the launcher has the other end of the pipe.
    return subprocess.run(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=HANG_S,
        start_new_session=True, check=check,
    )  # fmt: skip


def step_of(checkpoint):
    assert find_checkpoint_error(checkpoint) is None
    return json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]


@pytest.mark.slow
@pytest.mark.parametrize("order", [{"action": "terminate launcher"}, {"action": "terminate", "rank": 1}])
def test_sigterm_two_processes_stop_after_the_same_step_and_resume(tmp_path, order):
    """The launcher gets it and passes it on, or one of the processes gets it."""
    out = tmp_path / "out"
    torchrun = ["torchrun", "--standalone", "--nproc_per_node", 2]
    options = [SCRIPT, *OPTIONS, "--output_dir", out, "--max_steps"]
    ended = launch(*torchrun, *observed(out, at=STEP_BEGINS, number=3, **order), *options, 50)
    (checkpoint,) = out.glob("checkpoint-*")
    # The third step is ended; the one after it is the first that no process can have ended yet.
    assert step_of(checkpoint) == 4 and not (out / "model.safetensors").exists(), ended.stdout
    launch(*torchrun, *options, 6, "--resume_from_checkpoint", "last", check=True)
    assert json.loads((out / "all_results.json").read_text())["train_loss"] > 0
    steps = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps if "loss" in record] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_max_time_two_processes_stop_after_the_same_step_and_equal_an_unbroken_run(tmp_path):
    """The processes have clocks of their own, which begin at different times."""
    torchrun = ["torchrun", "--standalone", "--nproc_per_node", 2, SCRIPT, *OPTIONS, "--lr_scheduler_type", "constant"]
    out, unbroken = tmp_path / "out", tmp_path / "unbroken"
    ended = launch(*torchrun, "--output_dir", out, "--max_steps", 100_000, "--max_time", 0.02, check=True)
    (checkpoint,) = out.glob("checkpoint-*")
    step = step_of(checkpoint)
    assert f"saving a checkpoint at step {step} and stopping" in ended.stdout
    assert not (out / "model.safetensors").exists()
    last = ["--max_steps", step + 2]
    launch(*torchrun, "--output_dir", out, *last, "--resume_from_checkpoint", "last", check=True)
    launch(*torchrun, "--output_dir", unbroken, *last, check=True)
    models = [load_file(folder / "model.safetensors") for folder in (out, unbroken)]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    assert models[0].keys() == models[1].keys()


@pytest.mark.slow
@pytest.mark.parametrize("moment, number, step", [(STEP_BEGINS, 3, 3), (Moment("start-up", "trainer"), 1, 1)])
def test_sigterm_to_accelerate_alone_ends_the_run_with_a_checkpoint(tmp_path, moment, number, step):
    """accelerate passes nothing on when it ends. The run ends soon too, also where training has not begun."""
    out = tmp_path / "out"
    accelerate = ["accelerate", "launch", "--num_processes", 1]
    order = observed(out, at=moment, number=number, action="terminate launcher")
    ended = launch(*accelerate, *order, SCRIPT, *OPTIONS, "--output_dir", out, "--max_steps", 50)
    assert ended.returncode == -signal.SIGTERM
    assert [step_of(checkpoint) for checkpoint in out.glob("checkpoint-*")] == [step], ended.stdout


@pytest.mark.slow
def test_ctrl_c_under_accelerate_prints_one_line(tmp_path):
    out = tmp_path / "out"
    order = observed(out, at=STEP_BEGINS, number=3, action="interrupt")
    ended = launch("accelerate", "launch", "--num_processes", 1, *order, SCRIPT, *OPTIONS, "--output_dir", out)
    assert "finetune.py: interrupted; no checkpoint was written yet." in ended.stdout


@pytest.mark.slow
def test_sigkill_at_each_moment_ends_as_the_uninterrupted_run(tmp_path):
    moments, kills = kill_and_resume(tmp_path, None, seed=24, options=[])
    files = {path.name for path in (tmp_path / "uninterrupted" / "checkpoint-90").iterdir()}
    # Every file of a checkpoint is among the moments: its writing and its removal.
    for phase in ("checkpoint", "removal"):
        assert files <= {kill.moment.what for kill in kills if kill.moment.phase == phase}
    assert {kill.moment for kill in kills} >= set(moments) and len(kills) > 30
    assert list(differences(tmp_path / "uninterrupted", tmp_path / "killed")) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed, how, options",
    [
        (1, {}, "--dataloader_num_workers 2 --dataloader_persistent_workers True"),
        (2, {"streamed": True}, "--dataloader_num_workers 2"),
        (3, {"adapted": True}, ""),
        (4, {"streamed": True, "adapted": True}, "--gradient_accumulation_steps 2 --activation_checkpointing --bf16"),
    ],
)
def test_sigkill_in_each_phase_ends_as_the_uninterrupted_run(tmp_path, seed, how, options):
    moments, kills = kill_and_resume(tmp_path, 9, seed, options.split(), **how)
    assert {kill.moment.phase for kill in kills} == {moment.phase for moment in moments} and len(kills) == 9
    assert list(differences(tmp_path / "uninterrupted", tmp_path / "killed")) == []


def test_kill_plan_has_each_phase_for_any_seed():
    phases = [*WHILE_TRAINING, *AT_THE_END]
    moments = [Moment(phase, what) for phase in phases for what in "abc"]
    for seed in range(100):
        every = plan(moments, None, random.Random(seed))
        assert sorted(every) == sorted([*moments, *RESUMING])
        some = plan(moments, 9, random.Random(seed))
        assert {moment.phase for moment in some} == set(phases) and len(some) == 9
        for planned in (every, some):
            removal = next(index for index, moment in enumerate(planned) if moment.phase == "removal")
            assert not set(planned[: removal + 1]) & set(RESUMING)
            late = [moment.phase in AT_THE_END for moment in planned]
            assert late == sorted(late)
