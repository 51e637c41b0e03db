"""CPU threads under a launcher that limits them to one by default.

`accelerate launch` and `torchrun` set `OMP_NUM_THREADS=1` for their processes, even if these train on the CPU and no
other process uses its cores.
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
THREADS_VARIABLE = "OMP_NUM_THREADS"
THREAD_OPTION = "--num_cpu_threads_per_process"


def threads_chosen_by_launcher(command: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether the parent process is a launcher that set the number of threads by default.

    Args:
        command: command line of the parent process.
        environment: the environment that the parent process was started with.
    """
    # The launcher follows the interpreter and its options; later words belong to the script.
    is_launcher = any(LAUNCHER.fullmatch(Path(word).name.removesuffix(".exe")) for word in command[:4])
    requested = any(word.replace("-", "_").startswith(THREAD_OPTION.replace("-", "_")) for word in command)
    return is_launcher and not requested and THREADS_VARIABLE not in environment


def cores_per_process(local_processes: int) -> int:
    """Physical cores available to this process, divided by the processes of this machine; at least 1."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical = min(psutil.cpu_count(logical=False) or usable, usable)
    return max(1, physical // max(1, local_processes))


def use_physical_cores(device: torch.device) -> None:
    """Use the physical cores, divided by the local processes, in a process on the CPU, and log the number.

    Nothing changes on another device, without a launcher, or if the user set the number of threads
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
        THREADS_VARIABLE,
    )
