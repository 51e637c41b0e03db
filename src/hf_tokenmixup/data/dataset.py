"""Images and labels as the model reads them, one by one and in batches.

A training image's augmentation depends on (seed, epoch, index) alone: the order of reading, the number of workers and
an interruption in the middle of an epoch change nothing, and the global random generators stay untouched.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset as HFDataset
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import Dataset, get_worker_info


class ImageClassificationData(Dataset):
    """A split with its transform: `data[i] -> {"pixel_values": (3, H, W) float tensor, "labels": int}`.

    Args:
        dataset: the split.
        transform: from an RGB PIL image to a (3, H, W) tensor. Its attribute `draws_from_numpy = False`, if there,
            promises that it draws from torch and `random` alone, which saves time.
        image_column, label_column: the columns to read; labels are class numbers.
        split: name of the split, for error messages.
        seed: for training: makes the transform's random draws a function of (seed, epoch, index). None for
            evaluation: the transform draws nothing, or from the global generators.

    Seeding replaces the state of the global generators (torch's on the CPU, `random`, numpy's) while the transform
    runs and puts it back afterwards, so read from one thread per process, as DataLoader does.
    """

    def __init__(
        self,
        dataset: HFDataset,
        transform: Callable[[Image.Image], torch.Tensor],
        *,
        image_column: str = "image",
        label_column: str = "label",
        split: str = "train",
        seed: int | None = None,
    ) -> None:
        columns = dataset.select_columns([image_column, label_column])
        self.dataset = columns.cast_column(image_column, ImageFeature(decode=False)).with_format(None)
        self.transform = transform
        self.image_column = image_column
        self.label_column = label_column
        self.split = split
        self.seed = seed
        self._decoder = ImageFeature()
        self._draws_from_numpy = getattr(transform, "draws_from_numpy", True)
        # In shared memory: workers that outlive an epoch must see the next one's number.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentations are drawn, in this process and in its DataLoader workers."""
        self._epoch.fill_(int(epoch))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """
        Raises:
            ValueError: the image cannot be read or decoded; says which.
        """
        index = int(index)
        if index < 0:
            index += len(self)
        row = self.dataset[index]
        image = self._decode(row[self.image_column], index)
        if self.seed is None:
            pixel_values = self.transform(image)
        else:
            with isolated_generators(self.seed, self.epoch, index, self._draws_from_numpy):
                pixel_values = self.transform(image)
        return {"pixel_values": pixel_values, "labels": int(row[self.label_column])}

    def _decode(self, value: dict[str, Any] | None, index: int) -> Image.Image:
        try:
            if value is None:
                raise ValueError("there is no image (None)")
            return to_rgb(self._decoder.decode_example(value))
        # Pillow's decoders raise OSError, SyntaxError, struct.error and more.
        except Exception as error:
            path = f" ({value['path']})" if value and value.get("path") else ""
            raise ValueError(
                f"Image {index} of split '{self.split}'{path} cannot be decoded: {type(error).__name__}: {error}. "
                "Repair the file or remove the row from the data set."
            ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB, as the image-classification pipeline of transformers does it (alpha is dropped).

    Except for 16-bit grey images: these are scaled to 8 bits here, whereas Pillow, and with it the pipeline, turns all
    but the darkest 256 of their 65,536 levels white. Such files are better stored with 8 bits.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.rint(np.clip(np.asarray(image, dtype=np.float64) / 257, 0, 255))
        image = Image.fromarray(levels.astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        # Straight to RGB gives the same colours and a warning per image.
        image = image.convert("RGBA")
    return image.convert("RGB")


@contextmanager
def isolated_generators(seed: int, epoch: int, index: int, numpy_too: bool = True) -> Iterator[None]:
    """Seed torch's CPU generator, `random` and numpy's global one by (seed, epoch, index); restore them afterwards.

    numpy's generator takes longer to save and restore than the others together (65 of 90 microseconds): `numpy_too`
    leaves it out. DataLoader workers restore nothing, as nobody else draws in them.
    """
    digest = hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=20).digest()
    restore = get_worker_info() is None
    if restore:
        torch_state, python_state = torch.default_generator.get_state(), random.getstate()
        numpy_state = np.random.get_state() if numpy_too else None  # noqa: NPY002 (timm draws there)
    try:
        # Three different seeds: torch and numpy use the same algorithm and would repeat each other's draws.
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        random.seed(digest[8:16])
        if numpy_too:
            np.random.seed(int.from_bytes(digest[16:], "little"))  # noqa: NPY002
        yield
    finally:
        if restore:
            torch.default_generator.set_state(torch_state)
            random.setstate(python_state)
            if numpy_too:
                np.random.set_state(numpy_state)  # noqa: NPY002


def collate(batch: Sequence[dict[str, torch.Tensor | int]]) -> dict[str, torch.Tensor]:
    """A list of B examples -> {"pixel_values": (B, 3, H, W), "labels": (B,) int64}.

    Raises:
        ValueError: the images differ in size.
    """
    images = [example["pixel_values"] for example in batch]
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(
            f"Images of a batch must have one size, got {sorted(shapes)}. Use a transform that resizes to a fixed "
            "height and width."
        )
    labels = torch.tensor([int(example["labels"]) for example in batch], dtype=torch.int64)
    return {"pixel_values": torch.stack(images), "labels": labels}
