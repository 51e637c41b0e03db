"""Fork processes that are connected by gloo, for quick tests of several processes."""

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers.commands import HANG_S


def run_in_processes(function: Callable[[int], Any], folder: Path, world_size: int = 2) -> list[Any]:
    """Call a function in forks of this process.

    Args:
        function: Function of the rank.
        folder: Folder for the file that connects the processes.
        world_size: Number of processes.

    Returns:
        The result of each rank. An exception is returned as the name of its type and its message.
    """
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    init = f"file://{folder / 'store'}"
    processes = [
        context.Process(target=_run, args=(function, rank, world_size, init, pipes[rank][1]), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        return [receiver.recv() if receiver.poll(HANG_S) else "no result" for receiver, _ in pipes]
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def _run(function: Callable[[int], Any], rank: int, world_size: int, init: str, result: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=init, rank=rank, world_size=world_size, timeout=timedelta(seconds=HANG_S)
    )
    try:
        result.send(function(rank))
    except Exception as error:
        traceback.print_exc()
        result.send((type(error).__name__, str(error)))
    dist.destroy_process_group()
