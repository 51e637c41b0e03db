"""The images of a split, read as RGB: decoded at every reading, or once and kept in memory where they fit."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from datasets import Image as ImageFeature
from datasets.utils import tqdm
from PIL import Image, UnidentifiedImageError

logger = logging.getLogger(__name__)

GIB = 2**30
PROBED = 32


class StoredImages:
    """One image column of a split.

    Args:
        dataset: the split.
        column: its images: a `datasets.Image` column, image bytes or file paths.
        split: name of the split, for error messages.
        cache_gib: decode all images now and keep them, 3 bytes per pixel, if they fit into so many GiB (judged by a
            sample of them). 0 keeps none. DataLoader workers that are forked share the memory; spawned ones (macOS,
            Windows) each hold a copy.

    Raises:
        ValueError: `cache_gib` is below 0; with a cache, an image that cannot be read or decoded.
    """

    def __init__(self, dataset: Dataset, column: str, *, split: str = "train", cache_gib: float = 0.0) -> None:
        if not cache_gib >= 0:
            raise ValueError(f"image_cache_gib must be at least 0 (0: keep no images in memory), got {cache_gib}.")
        self.rows = dataset.select_columns([column]).cast_column(column, ImageFeature(decode=False)).with_format(None)
        # datasets 4 notes the path and size of every file of an image folder here, and each worker would get them.
        self.rows.info.download_checksums = None
        self.column = column
        self.split = split
        self._shapes, self._starts, self._pixels = None, None, None
        if cache_gib > 0 and len(self) and self._estimated_bytes() <= cache_gib * GIB:
            self._keep_all()

    @property
    def cached(self) -> bool:
        """Whether the decoded images lie in memory."""
        return self._pixels is not None

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        """The images at these places, as 8-bit RGB.

        Raises:
            ValueError: an image cannot be read or decoded; says which.
        """
        if self.cached:
            return [self._from_memory(index) for index in indices]
        values = self.rows[list(indices)][self.column]
        return [self._decode(value, index) for value, index in zip(values, indices, strict=True)]

    def _from_memory(self, index: int) -> Image.Image:
        height, width = self._shapes[index]
        pixels = np.frombuffer(self._pixels, np.uint8, 3 * height * width, self._starts[index])
        return Image.fromarray(pixels.reshape(height, width, 3))

    def _estimated_bytes(self) -> float:
        """Bytes that all decoded images take, judged by a sample."""
        sample = np.unique(np.linspace(0, len(self) - 1, min(PROBED, len(self))).astype(int)).tolist()
        images = self.read(sample)
        return sum(3 * image.width * image.height for image in images) / len(images) * len(self)

    def _keep_all(self) -> None:
        # One block without Python objects in it: forked workers, which count references, would copy those.
        pixels, shapes = bytearray(), np.empty((len(self), 2), dtype=np.int64)
        for start in tqdm(range(0, len(self), 256), desc=f"decoding {self.split}", delay=5):
            indices = range(start, min(start + 256, len(self)))
            for index, image in zip(indices, self.read(indices), strict=True):
                shapes[index] = image.height, image.width
                pixels += image.tobytes()
        self._shapes, self._pixels = shapes, pixels
        self._starts = np.concatenate([[0], np.cumsum(3 * shapes.prod(axis=1))])
        logger.info("Images of split '%s' are kept decoded: %.2f GiB.", self.split, len(pixels) / GIB)

    def _decode(self, value: dict[str, Any] | None, index: int) -> Image.Image:
        return decode(value, f"Image {index} of split '{self.split}'")


def decode(value: dict[str, Any] | None, place: str) -> Image.Image:
    """A stored image, `{"bytes", "path"}`, as 8-bit RGB.

    Raises:
        ValueError: it cannot be read or decoded; begins with `place`, which says where it stands.
    """
    try:
        if value is None:
            raise ValueError("there is no image (None)")
        return to_rgb(ImageFeature().decode_example(value))
    # Pillow's decoders raise OSError, SyntaxError, struct.error and more.
    except Exception as error:
        path = f" ({value['path']})" if value and value.get("path") else ""
        way_out = "Repair the file or remove the row from the data set."
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        if isinstance(error, UnidentifiedImageError):
            reason = "Pillow cannot identify it, so it is empty or no image"
        elif isinstance(error, Image.DecompressionBombError):
            way_out = "Store it smaller: a model reads but a few hundred pixels a side."
        raise ValueError(f"{place}{path} cannot be decoded: {reason}. {way_out}") from error


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
