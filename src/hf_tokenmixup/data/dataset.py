"""Images and labels as the model reads them, one by one and in batches.

A training image's augmentation depends on (seed, epoch, index) alone: the order of reading, the batch around it, the
number of workers and an interruption in the middle of an epoch change nothing, and the global random generators stay
untouched.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from datasets import Dataset as HFDataset
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from .columns import read_labels
from .epochs import SharedEpoch
from .image_cache import ImageReader
from .transforms import BatchTransform, SeedFn


class ImageClassificationData(Dataset):
    """A split with its transform: `data[i] -> {"pixel_values": (3, H, W) float tensor, "labels": int}`.

    The epoch is in shared memory, so that `set_epoch` reaches the workers of a DataLoader too. A DataLoader reads
    whole batches at once, so that a `BatchTransform` does its work on all images together.

    Args:
        dataset: the split.
        transform: from an RGB PIL image to a (3, H, W) tensor, or a `BatchTransform` (`build_transforms` makes such).
            An attribute `uses_numpy_rng = False`, if there, promises that it draws from torch and `random` alone,
            which saves time.
        image_column, label_column: the columns to read; labels are class numbers. With `label_column=None` the
            examples have no `labels`, as for `Trainer.predict`.
        split: name of the split, for error messages.
        seed: for training: makes the transform's random draws a function of (seed, epoch, index). None for
            evaluation: the transform draws nothing, or from the global generators.
        cache_gib: keep the decoded images in memory if they fit into so many GiB, see `ImageReader`.
        label_map: the class number to give out for each class of the column, see `build_label_mapping`.

    Seeding replaces the state of the global generators (torch's on the CPU, `random`, numpy's) while the transform
    runs and puts it back afterwards, so read from one thread per process, as DataLoader does.

    Raises:
        ValueError: with a cache, an image that cannot be read or decoded.
    """

    def __init__(
        self,
        dataset: HFDataset,
        transform: Callable[[Image.Image], torch.Tensor],
        *,
        image_column: str = "image",
        label_column: str | None = "label",
        split: str = "train",
        seed: int | None = None,
        cache_gib: float = 0.0,
        label_map: Sequence[int] | None = None,
    ) -> None:
        self.images = ImageReader(dataset, image_column, split=split, cache_gib=cache_gib)
        self.labels = None
        if label_column is not None:
            labels = read_labels(dataset, label_column).to_numpy()
            self.labels = labels if label_map is None else np.asarray(label_map)[labels]
        self.transform = transform
        self.seed = seed
        self._draws_from_numpy = getattr(transform, "uses_numpy_rng", True)
        self._epoch = SharedEpoch()

    @property
    def epoch(self) -> int:
        return self._epoch.get()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentations are drawn, in this process and in its DataLoader workers."""
        self._epoch.set(epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """
        Raises:
            ValueError: the image cannot be read or decoded; says which.
        """
        index = int(index)
        return self.__getitems__([index + len(self) if index < 0 else index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor | int]]:
        """The examples of a batch; DataLoader prefers this to reading them one by one."""
        indices = [int(index) for index in indices]
        images = self.images.read(indices)
        if self.seed is None:
            pixel_values = transformed(self.transform, images)
        else:
            epoch = self.epoch

            def reseed(position: int, stream: int) -> None:
                seed_rngs(self._draws_from_numpy, self.seed, epoch, indices[position], stream)

            with fork_rngs(self._draws_from_numpy):
                pixel_values = transformed(self.transform, images, reseed)
        if self.labels is None:
            return [{"pixel_values": image} for image in pixel_values]
        labels = self.labels[indices].tolist()
        return [{"pixel_values": p, "labels": label} for p, label in zip(pixel_values, labels, strict=True)]


def transformed(
    transform: Callable[[Image.Image], torch.Tensor], images: list[Image.Image], reseed: SeedFn | None = None
) -> Sequence[torch.Tensor]:
    """The images as tensors (3, H, W), together where the transform can; `reseed` as in `BatchTransform.batch`."""
    if isinstance(transform, BatchTransform):
        return transform.batch(images, reseed)
    tensors = []
    for position, image in enumerate(images):
        if reseed is not None:
            reseed(position, 0)
        tensors.append(transform(image))
    return tensors


def seed_rngs(include_numpy: bool, *key: int) -> None:
    """Seed torch's CPU generator, `random` and, if asked for, numpy's global one by a key of integers."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=20).digest()
    # Three different seeds: torch and numpy use the same algorithm and would repeat each other's draws.
    torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    random.seed(int.from_bytes(digest[8:16], "little"))
    if include_numpy:
        np.random.seed(int.from_bytes(digest[16:], "little"))  # noqa: NPY002 (timm draws there)


@contextmanager
def fork_rngs(include_numpy: bool = True) -> Iterator[None]:
    """Put the state of torch's CPU generator, `random` and numpy's global one back at the end.

    numpy's takes longer to save and restore than the others together: `include_numpy` leaves it out. DataLoader
    workers restore nothing, as nobody else draws in them.
    """
    if get_worker_info() is not None:
        yield
        return
    torch_state, python_state = torch.default_generator.get_state(), random.getstate()
    numpy_state = np.random.get_state() if include_numpy else None  # noqa: NPY002
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        random.setstate(python_state)
        if include_numpy:
            np.random.set_state(numpy_state)  # noqa: NPY002


def collate(batch: Sequence[dict[str, torch.Tensor | int]]) -> dict[str, torch.Tensor]:
    """Make a batch of a list of B examples.

    Args:
        batch: examples with `pixel_values` (3, H, W) and `labels`, or without labels, as for prediction. Other keys
            are dropped.

    Returns:
        `pixel_values` (B, 3, H, W), and `labels` (B,) int64 unless no example has any.

    Raises:
        ValueError: there is no example, the images differ in size, or only some of them have a label.
    """
    if not batch:
        raise ValueError("A batch must have at least one example, got none: check the sampler and the dataset.")
    images = [example["pixel_values"] for example in batch]
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(
            f"Images of a batch must have one size, got {sorted(shapes)}. Use a transform that resizes to a fixed "
            "height and width."
        )
    labels = [example["labels"] for example in batch if example.get("labels") is not None]
    if not labels:
        return {"pixel_values": torch.stack(images)}
    if len(labels) < len(images):
        raise ValueError(
            f"All images of a batch must have `labels`, or none of them, got {len(labels)} labels for {len(images)} "
            "images. Remove the images without a label, or predict them as a dataset of their own."
        )
    return {
        "pixel_values": torch.stack(images),
        "labels": torch.tensor([int(label) for label in labels], dtype=torch.int64),
    }
