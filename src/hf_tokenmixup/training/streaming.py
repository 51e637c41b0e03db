"""Training and evaluation on streams: sharded data loaders, counts of images, and resuming within an epoch."""

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, has_length

from ..data.iterable_dataset import ImageClassificationIterableDataset, RebatchedDataset
from .checkpointing.integrity import TRAINER_STATE_NAME
from .preemption import ignore_sigterm_in_worker

logger = logging.getLogger(__name__)


def is_streamed(dataset: Any) -> bool:
    """Whether a dataset is an `ImageClassificationIterableDataset`."""
    return isinstance(dataset, ImageClassificationIterableDataset)


def validate_run_length(train_dataset: Dataset | None, args: TrainingArguments) -> None:
    """Check that the number of steps of a run is known.

    Raises:
        ValueError: Neither the number of images of a stream nor `max_steps` is known.
    """
    if is_streamed(train_dataset) and train_dataset.num_images is None and args.max_steps <= 0:
        raise ValueError(
            f"The number of images in split '{train_dataset.split}' is unknown. Set `max_steps` instead of "
            "`num_train_epochs`."
        )


def build_train_loader(trainer: Trainer) -> DataLoader:
    """Build the data loader of a streamed `train_dataset`, in which every process reads its own shards.

    By itself Trainer has the first process read, decode and augment for all.
    """
    args, accelerator = trainer.args, trainer.accelerator
    data = trainer.train_dataset.shard(args.process_index, args.world_size, trainer._train_batch_size)
    return prepare_data_loader(
        _build_loader(trainer, data, persistent=args.dataloader_persistent_workers),
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        dispatch_batches=False,
        non_blocking=accelerator.non_blocking,
    )


def build_eval_loader(trainer: Trainer, data: ImageClassificationIterableDataset) -> DataLoader:
    """Build the data loader of a streamed evaluation: the first process reads for all, and each image counts once."""
    data = data.shard(0, 1, trainer.args.eval_batch_size)
    batches = RebatchedDataset(_build_loader(trainer, data), trainer.args.eval_batch_size)
    return trainer.accelerator.prepare(DataLoader(batches, batch_size=None))


def with_stream_length(output: EvalLoopOutput, dataloader: DataLoader, prefix: str) -> EvalLoopOutput:
    """Return the output of an evaluation with the number of images of the stream, which the first process counted."""
    batches = getattr(dataloader, "dataset", None)
    if not isinstance(batches, RebatchedDataset):
        return output
    # By itself Trainer reports the number of each process.
    (count,) = broadcast_object_list([batches.num_images])
    return output._replace(num_samples=count, metrics=output.metrics | {f"{prefix}_samples": count})


def find_resume_position(trainer: Trainer, checkpoint: str | None) -> tuple[int, int] | None:
    """Find where data without a length resumes: the number of complete passes, and of batches in the current pass.

    None where Trainer's own position is right: for data with a length, streams, and runs from scratch.
    """
    if not trainer.state.global_step or has_length(trainer.train_dataset) or is_streamed(trainer.train_dataset):
        return None
    # Trainer takes all steps of such a run for one epoch. It counts the passes in `state.epoch`, whose fraction counts
    # the batches of a pass as parts of all batches of the run.
    steps = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).max_steps
    passes = int(trainer.state.epoch)
    batches = round((trainer.state.epoch - passes) * steps * trainer.args.gradient_accumulation_steps)
    return passes, 0 if trainer.args.ignore_data_skip else batches


def _build_loader(trainer: Trainer, data: ImageClassificationIterableDataset, persistent: bool = False) -> DataLoader:
    args = trainer.args
    workers = min(args.dataloader_num_workers, data.num_shards)
    if workers < args.dataloader_num_workers:
        logger.warning(
            "Workers started for split '%s': %d of %d, one for each shard that a process reads.",
            data.split,
            workers,
            args.dataloader_num_workers,
        )
    # Newer versions of transformers have these.
    newer = {"multiprocessing_context": None, "in_order": True}
    newer = {name: getattr(args, f"dataloader_{name}", default) for name, default in newer.items()}
    return DataLoader(
        data,
        batch_size=data.batch_size,
        collate_fn=trainer.data_collator,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=persistent and workers > 0,
        prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        # The seeds of the workers would come from the global generator, once more after resuming.
        generator=torch.Generator().manual_seed(args.seed),
        worker_init_fn=ignore_sigterm_in_worker,
        **newer,
    )


class SkipBatchesCallback(TrainerCallback):
    """Pass to a stream which batches Trainer skips on resuming within an epoch, so that they are not decoded."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, train_dataloader=None, **kwargs
    ):
        data = getattr(train_dataloader, "dataset", None)
        if not isinstance(data, ImageClassificationIterableDataset):
            return
        steps = (
            args.max_steps if data.num_batches is None else -(-data.num_batches // args.gradient_accumulation_steps)
        )
        epoch, step = divmod(state.global_step, steps)
        data.skip_batches(epoch, 0 if args.ignore_data_skip else step * args.gradient_accumulation_steps)
