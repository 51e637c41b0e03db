"""Training and evaluating on streams: loaders that share the reading out, and resuming within an epoch."""

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, has_length

from ..data.iterable_dataset import ImageClassificationIterableDataset, RebatchedDataset
from .checkpointing.integrity import TRAINER_STATE_NAME
from .preemption import ignore_sigterm_in_worker

logger = logging.getLogger(__name__)


class StreamingTrainer(Trainer):
    """A Trainer that trains and evaluates on `ImageClassificationIterableDataset`, too.

    In training every process reads its own share; by itself the host has the first one read, decode and augment for
    all. In evaluation the first process reads for all, so that every image counts exactly once; `eval_samples` is
    their number.

    Raises:
        ValueError: neither the number of images nor `max_steps` is known.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        endless = isinstance(train_dataset, ImageClassificationIterableDataset) and train_dataset.num_images is None
        if endless and args.max_steps <= 0:
            raise ValueError(
                f"How many images split '{train_dataset.split}' holds is not known before it is read: say by "
                "--max_steps how long to train, instead of --num_train_epochs."
            )
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        self.add_callback(SkipBatchesCallback())

    def get_train_dataloader(self) -> DataLoader:
        if not isinstance(self.train_dataset, ImageClassificationIterableDataset):
            return super().get_train_dataloader()
        data = self.train_dataset.shard(self.args.process_index, self.args.world_size, self._train_batch_size)
        return prepare_data_loader(
            self._stream_loader(data, persistent=self.args.dataloader_persistent_workers),
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            non_blocking=self.accelerator.non_blocking,
        )

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        given = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        data = self.eval_dataset if given is None else given
        if not isinstance(data, ImageClassificationIterableDataset):
            return super().get_eval_dataloader(eval_dataset)
        data = data.shard(0, 1, self.args.eval_batch_size)
        batches = RebatchedDataset(self._stream_loader(data), self.args.eval_batch_size)
        return self.accelerator.prepare(DataLoader(batches, batch_size=None))

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        batches = getattr(dataloader, "dataset", None)
        if not isinstance(batches, RebatchedDataset):
            return output
        # By itself the host tells each process's own number. The first process has read for all.
        prefix = kwargs.get("metric_key_prefix", "eval")
        (count,) = broadcast_object_list([batches.num_images])
        return output._replace(num_samples=count, metrics=output.metrics | {f"{prefix}_samples": count})

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        *args: Any,
    ) -> tuple[int, int]:
        """As in `Trainer`; a run on data without a length resumes at its place in the pass that was interrupted."""
        place = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, *args
        )
        endless = isinstance(self.train_dataset, ImageClassificationIterableDataset)
        if not self.state.global_step or has_length(self.train_dataset) or endless:
            return place
        # The Trainer takes all steps of such a run for one epoch. It counts the passes in `state.epoch`, whose
        # fraction counts the batches of a pass as parts of all batches of the run.
        steps = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME)).max_steps
        passes = int(self.state.epoch)
        batches = round((self.state.epoch - passes) * steps * self.args.gradient_accumulation_steps)
        return passes, 0 if self.args.ignore_data_skip else batches

    def num_examples(self, dataloader: DataLoader) -> int:
        count = super().num_examples(dataloader)
        streamed = isinstance(getattr(dataloader, "dataset", None), ImageClassificationIterableDataset)
        return count * self.args.world_size if streamed else count

    def _stream_loader(self, data: ImageClassificationIterableDataset, persistent: bool = False) -> DataLoader:
        args = self.args
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
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=persistent and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
            # Its seeds for the workers would come from the model's generator, once more after resuming.
            generator=torch.Generator().manual_seed(args.seed),
            worker_init_fn=ignore_sigterm_in_worker,
            **newer,
        )


class SkipBatchesCallback(TrainerCallback):
    """Tell a stream which batches the host will leave out on resuming within an epoch: they need not be decoded."""

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
