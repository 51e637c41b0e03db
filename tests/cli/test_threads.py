"""The number of CPU threads of a launched process."""

import os
import subprocess
import sys

import pytest
import torch
from helpers.commands import HANG_S

from hf_tokenmixup.cli import threads

PYTHON = "/venv/bin/python"
CHILD = """
import torch
from hf_tokenmixup.cli import threads
threads.cores_per_process = lambda local_processes: 3
threads.use_physical_cores(torch.device("cpu"))
print(torch.get_num_threads())
"""
LAUNCHER = """
import os, subprocess, sys
environment = dict(os.environ, OMP_NUM_THREADS="1")
sys.exit(subprocess.call([sys.executable, "-c", sys.argv[1]], env=environment))
"""


@pytest.mark.parametrize(
    "command, environment, expected",
    [
        ([PYTHON, "/venv/bin/accelerate", "launch", "scripts/finetune.py"], {}, True),
        ([PYTHON, "/venv/bin/accelerate-launch", "scripts/finetune.py"], {}, True),
        ([PYTHON, "-m", "accelerate.commands.launch", "-m", "hf_tokenmixup.cli.finetune"], {}, True),
        (["C:\\python.exe", "accelerate.exe", "launch", "scripts\\finetune.py"], {}, True),
        ([PYTHON, "/venv/bin/torchrun", "--nproc_per_node", "2", "scripts/finetune.py"], {}, True),
        ([PYTHON, "-m", "torch.distributed.run", "scripts/finetune.py"], {}, True),
        ([PYTHON, "/venv/bin/accelerate", "launch", "scripts/finetune.py"], {"OMP_NUM_THREADS": "1"}, False),
        ([PYTHON, "/venv/bin/accelerate", "launch", "--num_cpu_threads_per_process", "1", "a.py"], {}, False),
        ([PYTHON, "/venv/bin/accelerate", "launch", "--num-cpu-threads-per-process=1", "a.py"], {}, False),
        (["bash"], {}, False),
        ([PYTHON, "-m", "pytest", "tests", "accelerate"], {}, False),
        ([], {}, False),
    ],
)
def test_threads_chosen_by_launcher_detects_launcher_default(command, environment, expected):
    assert threads.threads_chosen_by_launcher(command, environment) is expected


@pytest.mark.parametrize("processes, expected", [(1, 6), (2, 3), (4, 1), (16, 1), (0, 6)])
def test_cores_per_process_divides_physical_cores(monkeypatch, processes, expected):
    monkeypatch.setattr(threads.psutil, "cpu_count", lambda logical: 6)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(12), raising=False)
    assert threads.cores_per_process(processes) == expected


@pytest.mark.parametrize("physical, usable, expected", [(8, 2, 2), (None, 4, 4), (4, 8, 4)])
def test_cores_per_process_is_limited_to_usable_cores(monkeypatch, physical, usable, expected):
    monkeypatch.setattr(threads.psutil, "cpu_count", lambda logical: physical)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(usable), raising=False)
    assert threads.cores_per_process(1) == expected


def test_use_physical_cores_without_launcher_or_on_gpu_changes_nothing(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "cores_per_process", lambda local_processes: before + 5)
    threads.use_physical_cores(torch.device("cpu"))
    monkeypatch.setattr(threads, "threads_chosen_by_launcher", lambda command, environment: True)
    threads.use_physical_cores(torch.device("cuda"))
    assert torch.get_num_threads() == before


def test_use_physical_cores_under_launcher_sets_and_logs_threads(tmp_path):
    launcher = tmp_path / "torchrun"
    launcher.write_text(LAUNCHER)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, launcher, CHILD], env=environment, capture_output=True, text=True, timeout=HANG_S
    )
    assert done.stdout == "3\n", done.stderr
    assert "Training on the CPU with 3 threads per process" in done.stderr
    assert "Pass --num_cpu_threads_per_process, or set OMP_NUM_THREADS" in done.stderr
