"""Small streamed datasets for tests: parquet shards with numbered images."""

from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from PIL import Image as PILImage

CLASSES = ["ant", "bee", "cat", "dog"]


def numbered_images(numbers) -> Dataset:
    """Create images of 8 x 8 pixels.

    Args:
        numbers: Number of each image, below 65,536. Red is `number // 256` and green is `number % 256`.

    Returns:
        A dataset with the columns `image` and `label`. The label is `number % 4`.
    """
    pixels = [np.full((8, 8, 3), (number // 256, number % 256, 60 * (number % 4)), np.uint8) for number in numbers]
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    rows = {"image": [PILImage.fromarray(image) for image in pixels], "label": [number % 4 for number in numbers]}
    return Dataset.from_dict(rows, features=features)


def write_shards(folder: Path, sizes, split: str = "train", first: int = 0) -> Path:
    """Write one parquet file of numbered images per size, and return the folder. The numbers start at `first`."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, size in enumerate(sizes):
        file = folder / f"{split}-{shard:05d}-of-{len(sizes):05d}.parquet"
        numbered_images(range(first, first + size)).to_parquet(file)
        first += size
    return folder


def load_stream(folder: Path, split: str = "train"):
    """Open a split of a folder of shards as a streamed dataset."""
    return load_dataset(str(folder), split=split, streaming=True, cache_dir=str(folder.parent / "cache"))


class ReadNumber:
    """Transform that returns the number of an image and a random value, as a tensor of shape `(3, 1, 1)`.

    Args:
        draws: Whether to draw the random value, as an augmentation does. It is 0 otherwise.
    """

    uses_numpy_rng = False

    def __init__(self, draws: bool = True) -> None:
        self.draws = draws

    def __call__(self, image: PILImage.Image) -> torch.Tensor:
        high, low, _ = image.getpixel((0, 0))
        draw = torch.rand(()).item() if self.draws else 0.0
        return torch.tensor([256.0 * high + low, draw, 0.0]).view(3, 1, 1)
