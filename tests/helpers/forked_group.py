"""Two processes of this one, connected by gloo, for quick tests of what processes do together."""

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers.commands import HANG_S


def in_processes(function: Callable[[int], Any], folder: Path, world: int = 2) -> list[Any]:
    """What `function(rank)` returns in each process; an exception is returned as (name of its type, message)."""
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    init = f"file://{folder / 'store'}"
    processes = [
        context.Process(target=_run, args=(function, rank, world, init, pipes[rank][1]), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        return [receiver.recv() if receiver.poll(HANG_S) else "no result" for receiver, _ in pipes]
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def _run(function: Callable[[int], Any], rank: int, world: int, init: str, result: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world, timeout=timedelta(seconds=HANG_S))
    try:
        result.send(function(rank))
    except Exception as error:
        traceback.print_exc()
        result.send((type(error).__name__, str(error)))
    dist.destroy_process_group()
