"""Runs of a study: locked folders, settings that must match, resuming, and failures."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.commands import HANG_S

from hf_tokenmixup.studies import runner
from hf_tokenmixup.studies.definitions import Study, StudyRow
from hf_tokenmixup.studies.runner import (
    RunSpec,
    find_failure_reason,
    find_last_checkpoint,
    find_seeds,
    parse_option_words,
    run_dir,
    run_if_needed,
    validate_run_spec,
)

STUDY = Study("small", "A small study", (StudyRow("first", "a/one.yaml", 80.0), StudyRow("second", "two", 79.5)))
SPEC = RunSpec(["python"], {"num_train_epochs": ["3"], "seed": ["1"]}, {})


def test_parse_option_words_uses_the_last_value_and_omits_tokens():
    words = "--recipe x --learning-rate 1 --mixup_alpha=0.5 --horizontal_layers --crop_scale 0.5 1 --learning_rate -2"
    assert parse_option_words([*words.split(), "--token", "hf_secret", "--use_cpu"]) == {
        "learning_rate": ["-2"],
        "mixup_alpha": ["0.5"],
        "horizontal_layers": [],
        "crop_scale": ["0.5", "1"],
        "use_cpu": [],
    }


def write_checkpoint(folder: Path, step: int, state: str) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(state)
    return path


def test_find_last_checkpoint_skips_incomplete_checkpoints(tmp_path):
    assert find_last_checkpoint(tmp_path / "none") is None
    write_checkpoint(tmp_path, 9, '{"step": 9}')
    newest = write_checkpoint(tmp_path, 10, '{"step": 10}')
    write_checkpoint(tmp_path, 11, '{"st')
    (tmp_path / "checkpoint-12").mkdir()
    write_checkpoint(tmp_path / "checkpoint-best", 13, "{}")
    assert find_last_checkpoint(tmp_path) == newest


def test_find_seeds_ignores_other_folders(tmp_path):
    for row, seed in ((STUDY.rows[0], 3), (STUDY.rows[0], 12), (STUDY.rows[1], 3)):
        run_dir(tmp_path, row, seed).mkdir()
    (tmp_path / "one-seed-x").mkdir()
    (tmp_path / "other-seed-7").mkdir()
    assert find_seeds(tmp_path, STUDY) == [3, 12]


def command(code: str) -> list[str]:
    return [sys.executable, "-c", f"import json, os, sys, time\nfolder = sys.argv[1]\n{code}"]


FINISH = "open(f'{folder}/all_results.json', 'w').write(json.dumps({'eval_top1': 0.25}))\nprint(sys.argv[2:])"


def run(folder, code, spec=SPEC):
    messages = []
    unfinished = run_if_needed(folder, spec, [*command(code), str(folder)], messages.append)
    return unfinished and unfinished.reason, messages


def test_run_if_needed_resumes_and_skips_finished_runs(tmp_path):
    folder = tmp_path / "row"
    reason, messages = run(
        folder, "open(f'{folder}/all_results.json', 'w').write('{\"train_loss\"')\nsys.exit('Why.')"
    )
    assert messages == [f"starts; log: {folder}/finetune.log", "failed with status 1: Why."]
    assert reason == f"status 1, see {folder}/finetune.log"
    checkpoint = write_checkpoint(folder, 5, '{"step": 5}')
    reason, messages = run(folder, FINISH)
    assert (
        reason is None
        and messages[0].startswith("resumes from checkpoint-5;")
        and messages[1].startswith("top-1 25.00%")
    )
    assert f"['--resume_from_checkpoint', '{checkpoint}']" in (folder / "finetune.log").read_text()
    before = (folder / "finetune.log").read_text()
    assert run(folder, FINISH) == (None, ["top-1 25.00%, already finished"])
    assert (folder / "finetune.log").read_text() == before


def test_run_if_needed_without_evaluation_results_is_unfinished(tmp_path):
    reason, messages = run(tmp_path, "open(f'{folder}/all_results.json', 'w').write('{\"train_loss\": 1}')")
    assert reason.startswith("status 0") and messages[1] == "failed with status 0: no output"


def test_run_if_needed_with_other_options_raises(tmp_path):
    run(tmp_path, FINISH)
    validate_run_spec(tmp_path, SPEC)
    other = replace(SPEC, options={"num_train_epochs": ["5"], "seed": ["1"], "use_cpu": []})
    differences = "num_train_epochs was '3' and is now '5'; use_cpu was not set and is now ''"
    with pytest.raises(ValueError, match=f"with other options: {differences}. Repeat .* `output_dir`"):
        run(tmp_path, FINISH, other)
    with pytest.raises(ValueError, match="launcher was 'python' and is now 'torchrun -n 2'"):
        validate_run_spec(tmp_path, replace(SPEC, launcher=["torchrun", "-n", "2"]))
    (tmp_path / "all_results.json").unlink()
    validate_run_spec(tmp_path, other)  # there is no run to mix with
    write_checkpoint(tmp_path, 5, '{"step": 5}')
    with pytest.raises(ValueError, match="num_train_epochs"):
        validate_run_spec(tmp_path, other)
    (tmp_path / "study.json").unlink()
    with pytest.raises(ValueError, match="not created by study.py. Choose another `output_dir`"):
        validate_run_spec(tmp_path, SPEC)


def test_run_if_needed_skips_a_locked_folder(tmp_path):
    with (tmp_path / "finetune.log").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        reason, messages = run(tmp_path, FINISH)
    assert "another process" in reason and len(messages) == 1 and not (tmp_path / "all_results.json").exists()
    assert run(tmp_path, FINISH)[0] is None


def until(condition):
    """Wait until a condition of another process is met; fails if the process hangs."""
    deadline = time.monotonic() + HANG_S
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_run_if_needed_after_killed_study_finds_the_folder_locked(tmp_path):
    """Only the study is killed. Its training process continues and must not meet a second one."""
    training = f"print(os.getpid(), file=open(f'{{folder}}/pid', 'w'), flush=True)\ntime.sleep({HANG_S})"
    code = f"import fcntl, subprocess, sys\nlog = open({str(tmp_path / 'finetune.log')!r}, 'ab')\n"
    code += f"fcntl.flock(log, fcntl.LOCK_EX)\nsubprocess.Popen({[*command(training), str(tmp_path)]!r}, stdout=log)"
    subprocess.run([sys.executable, "-c", code], check=True)
    file = tmp_path / "pid"
    process = int(until(lambda: file.exists() and file.read_text().endswith("\n") and file.read_text()))
    try:
        assert "another process" in run(tmp_path, FINISH)[0]
    finally:
        os.kill(process, signal.SIGKILL)
    until(lambda: run(tmp_path, FINISH)[0] is None)


# A training that interrupts the study as soon as the study waits for it, and then sleeps.
INTERRUPTING = "import signal\n{first}\nwhile not os.path.exists(f'{{folder}}/study-waits'):\n    time.sleep(0.01)\n"
INTERRUPTING += "os.kill({study}, signal.SIGUSR1)\ntime.sleep({limit})"


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """Runs a launcher whose training interrupts the study; `{training}` in its code is the command of the training."""

    class Waiting(subprocess.Popen):
        def wait(self, *args, **kwargs):
            (tmp_path / "study-waits").touch()
            return super().wait(*args, **kwargs)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    def run_interrupted(launcher, first=""):
        training = INTERRUPTING.format(first=first, study=os.getpid(), limit=HANG_S)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, launcher.format(training=[*command(training), str(tmp_path)]))
        return run(tmp_path, FINISH)[0]

    monkeypatch.setattr(subprocess, "Popen", Waiting)
    before = signal.signal(signal.SIGUSR1, interrupt)
    yield run_interrupted
    signal.signal(signal.SIGUSR1, before)


def test_interrupt_terminates_a_launcher_that_ignores_sigterm(interrupted, tmp_path, monkeypatch):
    launcher = "import signal, subprocess\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    launcher += f"subprocess.Popen({{training}}).wait()\ntime.sleep({HANG_S})"
    monkeypatch.setattr(runner, "TERMINATE_TIMEOUT_S", 0.5)
    interrupted(launcher)
    assert until(lambda: run(tmp_path, FINISH)[0] is None)


def test_interrupt_waits_for_training_that_outlives_its_launcher(interrupted, tmp_path):
    """As with accelerate: the training saves a checkpoint, which a study that is restarted at once must find."""
    ending = "def end(*args):\n    time.sleep(0.5)\n    open(f'{folder}/saved', 'w')\n    os._exit(0)\n"
    launcher = "import subprocess\nsubprocess.Popen({training}).wait()"
    assert interrupted(launcher, first=f"{ending}signal.signal(signal.SIGTERM, end)") is None
    assert (tmp_path / "saved").exists()


def test_find_failure_reason_prefers_messages_over_exceptions():
    launcher = "Traceback (most recent call last):\n  raise\nsubprocess.CalledProcessError: returned status 1.\n"
    assert find_failure_reason("Loading\nfinetune.py: No data.\n" + launcher) == "finetune.py: No data."
    assert find_failure_reason("x\ntorch.OutOfMemoryError: CUDA out of memory.\n" + launcher).startswith(
        "torch.OutOfMemory"
    )
    assert find_failure_reason("Loading\nKilled\n\n") == "Killed"
    assert find_failure_reason("") == "no output"
