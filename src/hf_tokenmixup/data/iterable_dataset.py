"""Images of a stream: shared out among processes and workers, shuffled by a buffer, read again where it broke off.

Which image comes where is a function of (seed, epoch) and of how many processes and workers share the stream; its
augmentation depends besides on its place there. Nothing is kept of a buffer's content: to go on in the middle of an
epoch, the rows before are passed over, undecoded.
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

from .dataset import fork_rngs, seed_rngs, transformed
from .epochs import SharedEpoch
from .image_cache import WarnOnce, decode

Row = dict[str, Any]
Example = dict[str, torch.Tensor | int]


class ImageClassificationIterableDataset(IterableDataset):
    """A streamed split with its transform: yields `{"pixel_values": (3, H, W) float tensor, "labels": int}`.

    With a seed, for training: an epoch is a fixed number of batches, the same in every process, namely the images of
    the split // (processes * batch size); a process whose share of the images is smaller begins it again. Without a
    known number of images the stream never ends. Each DataLoader worker gives out its part of the batches, by its part
    of the shards. Without a seed, for evaluation: every image once, in order, transformed as it is.

    `datasets` shares the shards out among the processes where their number is a multiple of the processes'; elsewhere
    every process reads the whole stream and keeps one of so many images. Workers share the shards of their process:
    those above the number of shards do nothing.

    A worker reads its shards one after another, in a new order in every epoch, and shuffles what its buffer holds: a
    split that is stored sorted by class wants to be stored shuffled instead.

    A stream is that of a single process until `share` says otherwise.

    Args:
        dataset: the split, loaded with `streaming=True`.
        transform: as in `ImageClassificationData`.
        image_column, label_column: the columns to read; labels are class numbers.
        split: name of the split, for error messages.
        seed: order and augmentation of a training; None for evaluation.
        shuffle_buffer: undecoded images of a process that are shuffled at a time, shared by its workers. They lie in
            memory, with datasets 5 up to five times over.
        num_images: of the split; None if that is not known.
        batch_size: images that are transformed together.
        label_map: the class number to give out for each class of the column, see `build_label_mapping`.

    Iterating, an image that cannot be decoded and a label that is missing or out of range raise a ValueError that says
    where it stands.

    Raises:
        ValueError: a number out of its range.
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
                f"--shuffle_buffer must be at least 1 (1: no shuffling but of shards), got {shuffle_buffer}."
            )
        if num_images is not None and num_images < 1:
            raise ValueError(f"Expected at least one image in split '{split}', got {num_images}.")
        rows = dataset.with_format(None).select_columns([image_column, label_column])
        self.rows = rows.cast_column(image_column, ImageFeature(decode=False))
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
        self._draws_from_numpy = getattr(transform, "uses_numpy_rng", True)
        self.rank, self.world_size, self.batch_size = 0, 1, batch_size
        self._epoch = SharedEpoch()
        # In shared memory, for workers that live longer than one epoch.
        self._passed_over = torch.tensor([-1, 0]).share_memory_()

    def share(self, rank: int, world_size: int, batch_size: int) -> "ImageClassificationIterableDataset":
        """The part of process `rank` of `world_size`, for batches of `batch_size`; it keeps this one's epoch.

        Raises:
            ValueError: no such process, or no such batch size.
        """
        if not 0 <= rank < world_size or batch_size < 1:
            raise ValueError(
                f"Expected 0 <= rank < world_size and a batch_size of at least 1, got {rank}, {world_size}, "
                f"{batch_size}."
            )
        part = copy.copy(self)
        part.rank, part.world_size, part.batch_size = rank, world_size, batch_size
        return part

    @property
    def epoch(self) -> int:
        return self._epoch.get()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and augmentations are drawn, in this process and in its DataLoader workers."""
        self._epoch.set(epoch)

    def skip_batches(self, epoch: int, batches: int) -> None:
        """Of this epoch, give out so many batches of empty images first: they were trained on, and are not decoded."""
        self._passed_over.copy_(torch.tensor([epoch, batches]))

    @property
    def num_shards(self) -> int:
        """Shards that the workers of this process can share."""
        return split_dataset_by_node(self.rows, self.rank, self.world_size).num_shards

    @property
    def num_batches(self) -> int | None:
        """Batches of an epoch in each process; None if the number of images is not known."""
        if self.num_images is None:
            return None
        return max(1, self.num_images // (self.world_size * self.batch_size))

    def __len__(self) -> int:
        """Images of an epoch in this process.

        Raises:
            TypeError: not known, or an evaluation, where the stream itself tells.
        """
        if self.seed is None or self.num_batches is None:
            raise TypeError("This stream has no length that is known before it was read.")
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[Example]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        return self._evaluation(worker) if self.seed is None else self._iter_train(worker, workers)

    def _evaluation(self, worker: int) -> Iterator[Example]:
        rows = iter(split_dataset_by_node(self.rows, self.rank, self.world_size))
        first = 0
        while batch := list(itertools.islice(rows, self.batch_size)):
            yield from self._read(batch, first, f"process {self.rank}, worker {worker}")
            first += len(batch)

    def _iter_train(self, worker: int, workers: int) -> Iterator[Example]:
        epoch, (passed_epoch, passed) = self.epoch, self._passed_over.tolist()
        passed = passed if passed_epoch == epoch else 0
        parts = batches_per_worker(self.num_batches, self.num_shards, workers)
        place = f"process {self.rank}, worker {worker}, epoch {epoch}"
        rows = self._iter_shuffled_forever(epoch, workers, place)
        number = 0
        while number < parts[worker]:
            batch = list(itertools.islice(rows, self.batch_size))
            if global_batch_index(parts, worker, number) < passed:
                yield from ({"pixel_values": torch.empty(3, 0, 0), "labels": -100} for _ in batch)
            else:
                key = (self.seed, epoch, self.rank, worker)
                yield from self._read(batch, number * self.batch_size, place, key)
            number += 1

    def _iter_shuffled_forever(self, epoch: int, workers: int, place: str) -> Iterator[Row]:
        """The share of this process and worker, shuffled, again and again in other orders."""
        readers = max(1, min(workers, self.num_shards))
        options = {"buffer_size": -(-self.shuffle_buffer // readers)}
        # To read several shards side by side takes some 100 MB for each, and five seconds' sleep where they end.
        if "max_buffer_input_shards" in inspect.signature(HFIterableDataset.shuffle).parameters:
            options["max_buffer_input_shards"] = 1
        for beginning in itertools.count():
            (seed,) = np.random.SeedSequence((self.seed, epoch, beginning)).generate_state(1).tolist()
            shuffled = self.rows.shuffle(seed=seed, **options)
            some = False
            try:
                for row in split_dataset_by_node(shuffled, self.rank, self.world_size):
                    some = True
                    yield row
            except pa.ArrowInvalid as error:
                if "offset overflow" not in str(error):
                    raise
                raise ValueError(
                    f"{options['buffer_size']} undecoded images of '{self.split}' take more than 2 GiB, the most "
                    f"that Arrow shuffles at a time: lower --shuffle_buffer, which is {self.shuffle_buffer} for "
                    f"{readers} workers."
                ) from error
            if not some:
                raise ValueError(
                    f"No image of split '{self.split}' falls to {place}. Use fewer processes or "
                    "worker processes of the data loader, or store the split in more and even shards."
                )

    def _read(self, rows: list[Row], first: int, place: str, key: tuple[int, ...] | None = None) -> Iterator[Example]:
        places = [f"Image {first + i} of the stream of split '{self.split}' ({place})" for i in range(len(rows))]
        labels = [self._label(row, where) for row, where in zip(rows, places, strict=True)]
        images = [decode(row[self.image_column], where, self._warn) for row, where in zip(rows, places, strict=True)]
        if key is None:
            pixel_values = transformed(self.transform, images)
        else:

            def reseed(position: int, stream: int) -> None:
                seed_rngs(self._draws_from_numpy, *key, first + position, stream)

            with fork_rngs(self._draws_from_numpy):
                pixel_values = transformed(self.transform, images, reseed)
        for image, label in zip(pixel_values, labels, strict=True):
            yield {"pixel_values": image, "labels": label}

    def _label(self, row: Row, where: str) -> int:
        label = row[self.label_column]
        if label is None or label < 0 or (self._num_classes is not None and label >= self._num_classes):
            path = f" ({row[self.image_column]['path']})" if (row[self.image_column] or {}).get("path") else ""
            most = "" if self._num_classes is None else f" to {self._num_classes - 1}"
            carried = "Splits published without labels carry -1: choose another split, or remove such rows."
            beyond = "Choose a split of the same classes, or another column with --label_column_name."
            raise ValueError(
                f"{where}{path} has the label {label}; expected 0{most}. "
                f"{carried if label is None or label < 0 else beyond}"
            )
        return label if self.label_map is None else int(self.label_map[label])


def batches_per_worker(batches: int | None, shards: int, workers: int) -> list[float]:
    """How many batches each worker gives out: by its number of shards, and `batches` in all (None: without end)."""
    shards_before = np.cumsum([0, *(len(range(worker, shards, workers)) for worker in range(workers))]).tolist()
    if batches is None:
        return [np.inf if after > before else 0 for before, after in itertools.pairwise(shards_before)]
    return [
        batches * after // shards - batches * before // shards for before, after in itertools.pairwise(shards_before)
    ]


def global_batch_index(parts: Sequence[float], worker: int, number: int) -> int:
    """Which batch of the process a worker's batch is: a DataLoader takes one of each in turn, while it has any."""
    return int(sum(min(part, number + (other < worker)) for other, part in enumerate(parts)))


class RebatchedDataset(IterableDataset):
    """The batches of a loader cut anew, so that all but the last are full.

    Each worker of a loader ends a stream with a smaller batch, and neither the host's mean loss nor accelerate's
    sharing of batches among processes allows for one in the middle.

    Args:
        loader: its batches are dictionaries of tensors with the images along the first dimension.
        batch_size: images of a batch.

    Attributes:
        num_images: how many the last iteration has read so far.
    """

    def __init__(self, loader: Iterable[dict[str, torch.Tensor]], batch_size: int) -> None:
        self.loader = loader
        self.batch_size = batch_size
        self.num_images = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        held: dict[str, torch.Tensor] = {}
        self.num_images = 0
        for batch in self.loader:
            self.num_images += len(next(iter(batch.values())))
            held = {name: torch.cat([held[name], new]) if held else new for name, new in batch.items()}
            while len(next(iter(held.values()))) >= self.batch_size:
                yield {name: values[: self.batch_size] for name, values in held.items()}
                held = {name: values[self.batch_size :] for name, values in held.items()}
        if held and len(next(iter(held.values()))):
            yield held
