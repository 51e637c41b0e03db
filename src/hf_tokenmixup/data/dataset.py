"""Map-style dataset and collate function.

The augmentation of a training image is a function of the seed, the epoch and the index. It does not depend on the
order, the batch, the number of workers or interruptions, and does not change the global random number generators.
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
    """Split with a transform: `data[i]` is `{"pixel_values": (3, H, W) float tensor, "labels": int}`.

    The epoch is in shared memory, so `set_epoch` applies to the workers of a data loader, too. Data loaders read
    complete batches, so a `BatchTransform` processes all images of a batch together.

    Args:
        dataset: split.
        transform: function from an RGB PIL image to a (3, H, W) tensor, or a `BatchTransform` such as those of
            `build_transforms`. The attribute `uses_numpy_rng = False` states that it draws only from torch and
            `random`, which saves time. The attribute `min_side` states which resolution it needs, see `read_rgb`.
        image_column: name of the image column.
        label_column: name of the label column with class indices. With None the examples have no `labels`, as for
            `Trainer.predict`.
        split: name of the split, for messages.
        seed: seed of the transform in training. None for evaluation: the transform draws nothing, or from the global
            random number generators.
        cache_gib: maximum size of a cache of decoded images in GiB, see `ImageReader`.
        label_map: class index to return for each class of the column, see `build_label_mapping`.

    While the transform runs, the state of the global generators (torch on the CPU, `random`, numpy) is replaced.
    Therefore read from one thread per process, as data loaders do.

    Raises:
        ValueError: if `cache_gib` is set and an image cannot be decoded.
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
        self.images = ImageReader(
            dataset, image_column, split=split, cache_gib=cache_gib, min_side=getattr(transform, "min_side", None)
        )
        self.labels = None
        if label_column is not None:
            labels = read_labels(dataset, label_column).to_numpy()
            self.labels = labels if label_map is None else np.asarray(label_map)[labels]
        self.transform = transform
        self.seed = seed
        self._uses_numpy_rng = getattr(transform, "uses_numpy_rng", True)
        self._epoch = SharedEpoch()

    @property
    def epoch(self) -> int:
        return self._epoch.get()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the augmentation, for this process and its data loader workers."""
        self._epoch.set(epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """Return one example.

        Raises:
            ValueError: if the image cannot be decoded. The message names the image.
        """
        index = int(index)
        return self.__getitems__([index + len(self) if index < 0 else index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor | int]]:
        """Return the examples of a batch. Data loaders call this method instead of `__getitem__`."""
        indices = [int(index) for index in indices]
        images = self.images.read(indices)
        if self.seed is None:
            pixel_values = apply_transform(self.transform, images)
        else:
            epoch = self.epoch

            def seed_fn(position: int, stream: int) -> None:
                seed_rngs(self._uses_numpy_rng, self.seed, epoch, indices[position], stream)

            with fork_rngs(self._uses_numpy_rng):
                pixel_values = apply_transform(self.transform, images, seed_fn)
        if self.labels is None:
            return [{"pixel_values": image} for image in pixel_values]
        labels = self.labels[indices].tolist()
        return [{"pixel_values": p, "labels": label} for p, label in zip(pixel_values, labels, strict=True)]


def apply_transform(
    transform: Callable[[Image.Image], torch.Tensor], images: list[Image.Image], seed_fn: SeedFn | None = None
) -> Sequence[torch.Tensor]:
    """Transform images to tensors (3, H, W), together if the transform is a `BatchTransform`.

    Args:
        transform: the transform.
        images: RGB images.
        seed_fn: seeds the generators before each image, see `BatchTransform.batch`.
    """
    if isinstance(transform, BatchTransform):
        return transform.batch(images, seed_fn)
    tensors = []
    for position, image in enumerate(images):
        if seed_fn is not None:
            seed_fn(position, 0)
        tensors.append(transform(image))
    return tensors


def seed_rngs(include_numpy: bool, *key: int) -> None:
    """Seed torch's CPU generator, `random` and optionally numpy's global generator.

    Args:
        include_numpy: whether to seed numpy.
        key: integers that determine the seeds.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=20).digest()
    # The seeds differ, since torch and numpy use the same algorithm and would draw the same numbers.
    torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    random.seed(int.from_bytes(digest[8:16], "little"))
    if include_numpy:
        np.random.seed(int.from_bytes(digest[16:], "little"))  # noqa: NPY002 (timm draws there)


@contextmanager
def fork_rngs(include_numpy: bool = True) -> Iterator[None]:
    """Restore the state of torch's CPU generator, `random` and numpy's global generator on exit.

    Data loader workers do not restore the state, since only the transforms draw there.

    Args:
        include_numpy: whether to restore the state of numpy, which takes longer than the others together.
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
    """Collate B examples to a batch.

    Args:
        batch: examples with `pixel_values` (3, H, W) and optional `labels`. Other keys are ignored.

    Returns:
        `pixel_values` (B, 3, H, W), and `labels` (B,) int64 if the examples have labels.

    Raises:
        ValueError: if there are no examples, the images have different sizes, or only some examples have labels.
    """
    if not batch:
        raise ValueError("A batch must have at least one example, got 0. Check the sampler and the dataset.")
    images = [example["pixel_values"] for example in batch]
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(
            f"Images of a batch must have the same shape, got {sorted(shapes)}. Use a transform that resizes to a "
            "fixed height and width."
        )
    labels = [example["labels"] for example in batch if example.get("labels") is not None]
    if not labels:
        return {"pixel_values": torch.stack(images)}
    if len(labels) < len(images):
        raise ValueError(
            f"Either all examples of a batch or none must have `labels`, got {len(labels)} labels for {len(images)} "
            "images. Remove images without labels, or predict them in a separate dataset."
        )
    return {
        "pixel_values": torch.stack(images),
        "labels": torch.tensor([int(label) for label in labels], dtype=torch.int64),
    }
