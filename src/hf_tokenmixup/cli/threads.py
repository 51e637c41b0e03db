"""CPU threads under a launcher that limits them to one without being asked.

`accelerate launch` and `torchrun` set `OMP_NUM_THREADS=1` for the processes they start, also where these train on the
CPU and have all of its cores to themselves.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import torch

logger = logging.getLogger(__name__)

LAUNCHER = re.compile(r"accelerate([.-].*)?|torchrun|torch\.distributed\.(run|launch)")
CHOICE = "OMP_NUM_THREADS"
THREAD_OPTION = "--num_cpu_threads_per_process"


def threads_chosen_by_launcher(command: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether the parent process is a launcher that chose the number of threads itself.

    Args:
        command: the command line of the parent process.
        environment: the environment that the parent process was started with.
    """
    # After the interpreter and its options; what follows belongs to the script.
    is_launcher = any(LAUNCHER.fullmatch(Path(word).name.removesuffix(".exe")) for word in command[:4])
    asked = any(word.replace("-", "_").startswith(THREAD_OPTION.replace("-", "_")) for word in command)
    return is_launcher and not asked and CHOICE not in environment


def cores_per_process(local_processes: int) -> int:
    """Physical cores that this process may run on, divided by the processes of this machine; at least 1."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical = min(psutil.cpu_count(logical=False) or usable, usable)
    return max(1, physical // max(1, local_processes))


def use_physical_cores(device: torch.device) -> None:
    """Give a process that trains on the CPU its share of the physical cores, and log it.

    Nothing changes on another device, without a launcher, or where the user chose a number of threads
    (`--num_cpu_threads_per_process`, `OMP_NUM_THREADS`).
    """
    if device.type != "cpu":
        return
    try:
        parent = psutil.Process(os.getppid())
        by_launcher = threads_chosen_by_launcher(parent.cmdline(), parent.environ())
    except (psutil.Error, OSError):
        return
    threads = cores_per_process(int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    if not by_launcher or threads <= torch.get_num_threads():
        return
    torch.set_num_threads(threads)
    logger.warning(
        "Training on the CPU with %d threads per process (physical cores divided by local processes) instead of the "
        "launcher's 1. Pass %s, or set %s, for another number.",
        threads,
        THREAD_OPTION,
        CHOICE,
    )
