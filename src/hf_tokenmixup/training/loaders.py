"""Settings of the data loaders that Trainer builds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer

from .preemption import ignore_sigterm_in_worker
from .processes import CommonSampler, common_seed, is_data_parallel


@contextmanager
def loader_settings(trainer: Trainer, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Change the settings with which Trainer builds a data loader, and restore the arguments on exit.

    An evaluation counts every image, also with `dataloader_drop_last`. The order of the images is the same in all
    processes, which draw other random numbers.

    Args:
        trainer: The trainer.
        settings: Keyword arguments of `Trainer._get_dataloader`.
    """
    args = trainer.args
    drop_last = args.dataloader_drop_last
    args.dataloader_drop_last = drop_last and settings.get("is_training", False)
    if is_data_parallel(args) and settings.get("sampler_fn") is not None:
        settings = settings | {"sampler_fn": partial(_common_sampler, trainer, settings["sampler_fn"])}
    try:
        with common_seed(args):
            yield settings
    finally:
        args.dataloader_drop_last = drop_last


def set_generator_and_workers(loader: DataLoader, seed: int) -> DataLoader:
    """Give a data loader a generator of its own, and workers that ignore SIGTERM.

    By itself it draws one number of the global generator each time its workers start, which is once with persistent
    workers, and once more after resuming.
    """
    # Loaders of accelerate wrap one of torch's, or are one.
    torch_loader = getattr(loader, "base_dataloader", loader)
    torch_loader.generator = torch.Generator().manual_seed(seed)
    torch_loader.worker_init_fn = partial(ignore_sigterm_in_worker, worker_init_fn=torch_loader.worker_init_fn)
    return loader


def _common_sampler(
    trainer: Trainer, sampler_fn: Callable[[Dataset], Sampler | None], dataset: Dataset
) -> Sampler | None:
    seed = trainer.args.seed if trainer.args.data_seed is None else trainer.args.data_seed
    return CommonSampler.wrap(sampler_fn(dataset), seed, lambda: int(trainer.state.epoch or 0))
