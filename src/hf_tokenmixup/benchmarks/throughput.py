"""Images per second of the data loader alone, of the model alone, and of a complete training run."""

import time
from collections.abc import Iterable, Iterator, Sized
from itertools import cycle, islice
from statistics import median
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from ..data import collate


class TimingCallback(TrainerCallback):
    """Measures the seconds between the end of the warm-up steps and the end of training."""

    def __init__(self, warmup: int, device: torch.device) -> None:
        self.warmup = warmup
        self.device = device
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (self.warmup, state.max_steps):
            synchronize(self.device)
            self.seconds = time.perf_counter() - self.seconds


class RepeatedBatchLoader:
    """A data loader without cost: it yields the same batch `num_batches` times."""

    def __init__(self, batch: dict[str, torch.Tensor], num_batches: int) -> None:
        self.batch = batch
        self.num_batches = num_batches

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (dict(self.batch) for _ in range(self.num_batches))


def measure_throughput(
    trainer: Trainer, *, warmup: int = 10, steps: int = 30, repeats: int = 3
) -> dict[str, tuple[float, float, float]]:
    """Measure the images per second of data loader, model and complete training in turn.

    The model is trained further, and nothing is saved.

    Args:
        trainer: Trainer with `max_steps = warmup + steps` and `dataloader_drop_last`, as a smaller batch would
            count as a full one.
        warmup: Steps before each measurement, in which workers start, memory is allocated and the model is compiled.
        steps: Steps (batches for the loader) per measurement.
        repeats: Number of measurements of each kind.

    Returns:
        Minimum, median and maximum images per second in this process, by `loader`, `model` and `end_to_end`.

    Raises:
        ValueError: warmup, steps or repeats is below 1, max_steps differs, or the split has fewer images than a batch.
    """
    if min(warmup, steps, repeats) < 1 or trainer.args.max_steps != warmup + steps:
        raise ValueError(
            "warmup, steps and repeats must be at least 1, and the trainer's max_steps must be warmup + steps, got "
            f"{warmup}, {steps}, {repeats} and max_steps={trainer.args.max_steps}."
        )
    device, batch_size = trainer.args.device, trainer.args.train_batch_size
    images_per_step = batch_size * trainer.args.world_size
    data = trainer.train_dataset
    if isinstance(data, Sized) and len(data) < images_per_step:
        raise ValueError(
            f"A step needs {images_per_step} images, but the training split has {len(data)}. Use a smaller "
            "per_device_train_batch_size."
        )
    batch = collate(list(islice(cycle(trainer.train_dataset), batch_size)))
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    callback = TimingCallback(warmup, device)
    trainer.add_callback(callback)
    seconds: dict[str, list[float]] = {"loader": [], "model": [], "end_to_end": []}
    try:
        for _ in range(repeats):
            seconds["loader"].append(_time_loader(trainer.get_train_dataloader(), warmup, steps))
            trainer.get_train_dataloader = lambda: RepeatedBatchLoader(batch, warmup + steps)
            seconds["model"].append(_time_training(trainer, callback))
            del trainer.get_train_dataloader
            seconds["end_to_end"].append(_time_training(trainer, callback))
    finally:
        trainer.remove_callback(callback)
    throughput = {name: [batch_size * steps / value for value in values] for name, values in seconds.items()}
    return {name: (min(values), median(values), max(values)) for name, values in throughput.items()}


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished all queued work. Does nothing on CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _time_loader(loader: Iterable[Any], warmup: int, steps: int) -> float:
    start, num_batches = 0.0, 0
    while num_batches < warmup + steps:
        for _ in loader:
            num_batches += 1
            if num_batches == warmup:
                start = time.perf_counter()
            if num_batches == warmup + steps:
                break
    return time.perf_counter() - start


def _time_training(trainer: Trainer, callback: TimingCallback) -> float:
    callback.seconds = 0.0
    trainer.train()
    return callback.seconds
