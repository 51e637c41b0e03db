"""Iterable dataset of a stream: sharded over processes and workers, shuffled with a buffer, and resumable.

The order of the images is a function of the seed, the epoch and the numbers of processes and workers. The augmentation
of an image also depends on its position in this order. The content of the shuffle buffer is not saved: to resume
within an epoch, earlier rows are read again and skipped without decoding.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import ClassLabel
from datasets import Image as ImageFeature
from datasets import IterableDataset as HFIterableDataset
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from .dataset import apply_transform, fork_rngs, seed_rngs
from .epochs import SharedEpoch
from .image_cache import WarnOnce, decode_image

Row = dict[str, Any]
Example = dict[str, torch.Tensor | int]


class ImageClassificationIterableDataset(IterableDataset):
    """Streamed split with a transform. Yields `{"pixel_values": (3, H, W) float tensor, "labels": int}`.

    Training (with a seed): each process yields the same fixed number of batches per epoch, the number of images
    divided by the number of processes and the batch size, rounded down. A process with fewer images in its shards
    starts them again. If the number of images is unknown, the stream does not end. Each worker of the data loader
    yields batches in proportion to its number of shards.

    Evaluation (without a seed): each image once, in order.

    If the number of shards is a multiple of the number of processes, `datasets` distributes the shards. Otherwise each
    process reads the complete stream and keeps every n-th image of n processes. The shards of a process are
    distributed over its workers; surplus workers yield nothing.

    A worker reads its shards one by one, in a new order in each epoch, and shuffles only within its buffer. Datasets
    that are sorted by class should be shuffled before they are stored.

    The dataset is that of a single process unless `shard` is called.

    Args:
        dataset: split, loaded with `streaming=True`.
        transform: as in `ImageClassificationData`.
        image_column: name of the image column.
        label_column: name of the label column with class indices.
        split: name of the split, for messages.
        seed: seed of the order and the augmentation in training; None for evaluation.
        shuffle_buffer: number of encoded images in the shuffle buffer of a process, divided by its workers. The images
            are in memory, up to five times with datasets 5.
        num_images: number of images of the split; None if it is unknown.
        batch_size: number of images that are transformed together.
        label_map: class index to yield for each class of the column, see `build_label_mapping`.

    Iterating raises a `ValueError` for images that cannot be decoded, and for labels that are missing or out of range.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        dataset: HFIterableDataset,
        transform: Callable[[Image.Image], torch.Tensor],
        *,
        image_column: str = "image",
        label_column: str = "label",
        split: str = "train",
        seed: int | None = None,
        shuffle_buffer: int = 5000,
        num_images: int | None = None,
        batch_size: int = 32,
        label_map: Sequence[int] | None = None,
    ) -> None:
        if shuffle_buffer < 1:
            raise ValueError(
                f"`shuffle_buffer` must be at least 1 (1 shuffles only the shards), got {shuffle_buffer}."
            )
        if num_images is not None and num_images < 1:
            raise ValueError(f"Expected at least one image in split '{split}', got {num_images}.")
        columns = dataset.with_format(None).select_columns([image_column, label_column])
        self.dataset = columns.cast_column(image_column, ImageFeature(decode=False))
        self.transform = transform
        self.image_column = image_column
        self.label_column = label_column
        self.split = split
        self._warn = WarnOnce(split)
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.num_images = num_images
        self.label_map = label_map
        feature = dataset.features[label_column]
        self._num_classes = feature.num_classes if isinstance(feature, ClassLabel) else None
        self._min_side = getattr(transform, "min_side", None)
        self._uses_numpy_rng = getattr(transform, "uses_numpy_rng", True)
        self.rank, self.world_size, self.batch_size = 0, 1, batch_size
        self._epoch = SharedEpoch()
        # Epoch and number of batches to skip, in shared memory for persistent workers.
        self._skip_state = torch.tensor([-1, 0]).share_memory_()

    def shard(self, rank: int, world_size: int, batch_size: int) -> "ImageClassificationIterableDataset":
        """Return the shard of a process. It shares the epoch of this dataset.

        Args:
            rank: index of the process.
            world_size: number of processes.
            batch_size: number of images per batch.

        Raises:
            ValueError: if an argument is out of range.
        """
        if not 0 <= rank < world_size or batch_size < 1:
            raise ValueError(
                f"Expected 0 <= rank < world_size and a batch_size of at least 1, got {rank}, {world_size}, "
                f"{batch_size}."
            )
        shard = copy.copy(self)
        shard.rank, shard.world_size, shard.batch_size = rank, world_size, batch_size
        return shard

    @property
    def epoch(self) -> int:
        return self._epoch.get()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines order and augmentation, for this process and its data loader workers."""
        self._epoch.set(epoch)

    def skip_batches(self, epoch: int, batches: int) -> None:
        """Replace the first batches of an epoch by empty images, which are not decoded.

        Args:
            epoch: the epoch to resume.
            batches: number of batches to skip.
        """
        self._skip_state.copy_(torch.tensor([epoch, batches]))

    @property
    def num_shards(self) -> int:
        """Number of shards of this process."""
        return split_dataset_by_node(self.dataset, self.rank, self.world_size).num_shards

    @property
    def num_batches(self) -> int | None:
        """Number of batches per epoch in each process; None if the number of images is unknown."""
        if self.num_images is None:
            return None
        return max(1, self.num_images // (self.world_size * self.batch_size))

    def __len__(self) -> int:
        """Return the number of images per epoch in this process.

        Raises:
            TypeError: if the number of images is unknown, or in evaluation.
        """
        if self.seed is None or self.num_batches is None:
            raise TypeError("The length of this stream is unknown before it is read.")
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[Example]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        return self._iter_eval(worker) if self.seed is None else self._iter_train(worker, workers)

    def _iter_eval(self, worker: int) -> Iterator[Example]:
        rows = iter(split_dataset_by_node(self.dataset, self.rank, self.world_size))
        first = 0
        while batch := list(itertools.islice(rows, self.batch_size)):
            yield from self._read(batch, first, f"process {self.rank}, worker {worker}")
            first += len(batch)

    def _iter_train(self, worker: int, workers: int) -> Iterator[Example]:
        epoch, (skipped_epoch, num_skipped) = self.epoch, self._skip_state.tolist()
        num_skipped = num_skipped if skipped_epoch == epoch else 0
        parts = batches_per_worker(self.num_batches, self.num_shards, workers)
        location = f"process {self.rank}, worker {worker}, epoch {epoch}"
        rows = self._iter_shuffled_forever(epoch, workers, location)
        index = 0
        while index < parts[worker]:
            batch = list(itertools.islice(rows, self.batch_size))
            if global_batch_index(parts, worker, index) < num_skipped:
                yield from ({"pixel_values": torch.empty(3, 0, 0), "labels": -100} for _ in batch)
            else:
                key = (self.seed, epoch, self.rank, worker)
                yield from self._read(batch, index * self.batch_size, location, key)
            index += 1

    def _iter_shuffled_forever(self, epoch: int, workers: int, location: str) -> Iterator[Row]:
        """Yield the rows of this process and worker repeatedly, each time in another order."""
        num_active_workers = max(1, min(workers, self.num_shards))
        options = {"buffer_size": -(-self.shuffle_buffer // num_active_workers)}
        # Reading several shards at the same time takes about 100 MB per shard, and `datasets` sleeps 5 s at their end.
        if "max_buffer_input_shards" in inspect.signature(HFIterableDataset.shuffle).parameters:
            options["max_buffer_input_shards"] = 1
        for repeat_index in itertools.count():
            (seed,) = np.random.SeedSequence((self.seed, epoch, repeat_index)).generate_state(1).tolist()
            shuffled = self.dataset.shuffle(seed=seed, **options)
            yielded_any = False
            try:
                for row in split_dataset_by_node(shuffled, self.rank, self.world_size):
                    yielded_any = True
                    yield row
            except pa.ArrowInvalid as error:
                if "offset overflow" not in str(error):
                    raise
                raise ValueError(
                    f"{options['buffer_size']} encoded images of split '{self.split}' take more than 2 GiB, the "
                    f"maximum size of an Arrow buffer. Reduce `shuffle_buffer`, which is {self.shuffle_buffer} for "
                    f"{num_active_workers} workers."
                ) from error
            if not yielded_any:
                raise ValueError(
                    f"There are no images of split '{self.split}' for {location}. Use fewer processes, fewer data "
                    "loader workers, or more shards of equal size."
                )

    def _read(
        self, rows: list[Row], first: int, location: str, key: tuple[int, ...] | None = None
    ) -> Iterator[Example]:
        names = [f"Image {first + i} of the stream of split '{self.split}' ({location})" for i in range(len(rows))]
        labels = [self._read_label(row, name) for row, name in zip(rows, names, strict=True)]
        images = [
            decode_image(row[self.image_column], name, self._warn, self._min_side)
            for row, name in zip(rows, names, strict=True)
        ]
        if key is None:
            pixel_values = apply_transform(self.transform, images)
        else:

            def seed_fn(position: int, stream: int) -> None:
                seed_rngs(self._uses_numpy_rng, *key, first + position, stream)

            with fork_rngs(self._uses_numpy_rng):
                pixel_values = apply_transform(self.transform, images, seed_fn)
        for image, label in zip(pixel_values, labels, strict=True):
            yield {"pixel_values": image, "labels": label}

    def _read_label(self, row: Row, name: str) -> int:
        label = row[self.label_column]
        if label is None or label < 0 or (self._num_classes is not None and label >= self._num_classes):
            path = f" ({row[self.image_column]['path']})" if (row[self.image_column] or {}).get("path") else ""
            expected = "0 or more" if self._num_classes is None else f"0 to {self._num_classes - 1}"
            hint = "Choose a split with the same classes, or another column with `label_column_name`."
            if label is None or label < 0:
                hint = "Splits without labels often have -1: choose another split, or remove such rows."
            raise ValueError(f"{name}{path} has the label {label}; expected {expected}. {hint}")
        return label if self.label_map is None else int(self.label_map[label])


def batches_per_worker(batches: int | None, shards: int, workers: int) -> list[float]:
    """Return the number of batches of each worker, in proportion to its number of shards.

    Args:
        batches: number of batches of the process; None: unlimited.
        shards: number of shards of the process.
        workers: number of workers.
    """
    shards_before = np.cumsum([0, *(len(range(worker, shards, workers)) for worker in range(workers))]).tolist()
    if batches is None:
        return [np.inf if after > before else 0 for before, after in itertools.pairwise(shards_before)]
    return [
        batches * after // shards - batches * before // shards for before, after in itertools.pairwise(shards_before)
    ]


def global_batch_index(parts: Sequence[float], worker: int, index: int) -> int:
    """Return the index of a worker's batch among all batches of the process. Data loaders alternate between workers.

    Args:
        parts: number of batches of each worker.
        worker: index of the worker.
        index: index of the batch in this worker.
    """
    return int(sum(min(part, index + (other < worker)) for other, part in enumerate(parts)))


class RebatchedDataset(IterableDataset):
    """Iterable dataset that rebatches a data loader, so that only the last batch is smaller.

    Each worker of a data loader ends a stream with a smaller batch. The mean loss of `Trainer` and the batch dispatch
    of accelerate do not support smaller batches before the last one.

    Args:
        loader: data loader whose batches are dictionaries of tensors, with the images along the first dimension.
        batch_size: number of images per batch.

    Attributes:
        num_images: number of images read in the current iteration.
    """

    def __init__(self, loader: Iterable[dict[str, torch.Tensor]], batch_size: int) -> None:
        self.loader = loader
        self.batch_size = batch_size
        self.num_images = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        buffer: dict[str, torch.Tensor] = {}
        self.num_images = 0
        for batch in self.loader:
            self.num_images += len(next(iter(batch.values())))
            buffer = {name: torch.cat([buffer[name], new]) if buffer else new for name, new in batch.items()}
            while len(next(iter(buffer.values()))) >= self.batch_size:
                yield {name: values[: self.batch_size] for name, values in buffer.items()}
                buffer = {name: values[self.batch_size :] for name, values in buffer.items()}
        if buffer and len(next(iter(buffer.values()))):
            yield buffer
