"""Images per second of a training: its input pipeline alone, its model alone, and both together."""

import time
from collections.abc import Iterable, Iterator, Sized
from itertools import cycle, islice
from statistics import median
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from ..data import collate


class TimingCallback(TrainerCallback):
    """Seconds between the end of the warm-up steps and the end of training."""

    def __init__(self, warmup: int, device: torch.device) -> None:
        self.warmup = warmup
        self.device = device
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (self.warmup, state.max_steps):
            synchronize(self.device)
            self.seconds = time.perf_counter() - self.seconds


class RepeatedBatchLoader:
    """One batch, so many times: a loader that costs nothing."""

    def __init__(self, batch: dict[str, torch.Tensor], times: int) -> None:
        self.batch = batch
        self.times = times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (dict(self.batch) for _ in range(self.times))


def measure_throughput(
    trainer: Trainer, *, warmup: int = 10, steps: int = 30, rounds: int = 3
) -> dict[str, tuple[float, float, float]]:
    """Train for short stretches, with and without the loader, in turn; the model is trained on, nothing is saved.

    Args:
        trainer: ready to train, with `max_steps` set to `warmup + steps` and `dataloader_drop_last` (a smaller batch
            would count as a whole one).
        warmup: steps in front of each stretch that are not timed: workers start, memory is found, a compiler compiles.
        steps: timed steps (or, for the loader, batches) of a stretch.
        rounds: stretches of each kind.

    Returns:
        For `loader`, `model` and `whole`, images per second in this process: least, median and greatest of the rounds.

    Raises:
        ValueError: fewer than one step or round, a trainer with other `max_steps`, or fewer images than a batch takes.
    """
    if min(warmup, steps, rounds) < 1 or trainer.args.max_steps != warmup + steps:
        raise ValueError(
            f"Expected warmup, steps and rounds of at least 1 and a trainer with max_steps = warmup + steps, got "
            f"{warmup}, {steps}, {rounds} and max_steps={trainer.args.max_steps}."
        )
    device, size = trainer.args.device, trainer.args.train_batch_size
    per_step = size * trainer.args.world_size
    data = trainer.train_dataset
    if isinstance(data, Sized) and len(data) < per_step:
        raise ValueError(
            f"A step takes {per_step} images, and the training split has {len(data)}: choose a smaller "
            "per_device_train_batch_size."
        )
    batch = collate(list(islice(cycle(trainer.train_dataset), size)))
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    watch = TimingCallback(warmup, device)
    trainer.add_callback(watch)
    results: dict[str, list[float]] = {"loader": [], "model": [], "whole": []}
    try:
        for _ in range(rounds):
            results["loader"].append(size * steps / _time_loader(trainer.get_train_dataloader(), warmup, steps))
            trainer.get_train_dataloader = lambda: RepeatedBatchLoader(batch, warmup + steps)
            results["model"].append(size * steps / _time_training(trainer, watch))
            del trainer.get_train_dataloader
            results["whole"].append(size * steps / _time_training(trainer, watch))
    finally:
        trainer.remove_callback(watch)
    return {name: (min(values), median(values), max(values)) for name, values in results.items()}


def synchronize(device: torch.device) -> None:
    """Wait until the accelerator, if the device is one, has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _time_loader(loader: Iterable[Any], warmup: int, steps: int) -> float:
    start, read = 0.0, 0
    while read < warmup + steps:
        for _ in loader:
            read += 1
            if read == warmup:
                start = time.perf_counter()
            if read == warmup + steps:
                break
    return time.perf_counter() - start


def _time_training(trainer: Trainer, watch: TimingCallback) -> float:
    watch.seconds = 0.0
    trainer.train()
    return watch.seconds
