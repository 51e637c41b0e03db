"""Read the images of a split as RGB, with an optional cache of decoded images."""

import io
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from datasets.utils import tqdm
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..utils.text import format_list
from .value_range import StoredValues, Warn, is_deep, read_stored_values, rescale_truncated, to_8_bits

logger = logging.getLogger(__name__)

GIB = 2**30
SIZE_ESTIMATE_SAMPLES = 32
MAX_CHECK_SECONDS = 60
MAX_SHOWN = 10


class ImageReader:
    """Reader of the image column of a split.

    Args:
        dataset: split.
        column: image column: `datasets.Image`, image bytes or file paths.
        split: name of the split, for messages.
        cache_gib: maximum size of the cache in GiB. If all images fit (estimated from a sample), they are decoded at
            once and stored with 3 bytes per pixel. 0 turns the cache off. Forked data loader workers share the memory;
            each spawned worker (macOS, Windows) has a copy.
        min_side: as in `read_rgb`.

    Raises:
        ValueError: if `cache_gib` is negative, or an image cannot be decoded for the cache.
    """

    def __init__(
        self,
        dataset: Dataset,
        column: str,
        *,
        split: str = "train",
        cache_gib: float = 0.0,
        min_side: int | None = None,
    ) -> None:
        if not cache_gib >= 0:
            raise ValueError(f"image_cache_gib must be at least 0 (0: no cache), got {cache_gib}.")
        self.dataset = (
            dataset.select_columns([column]).cast_column(column, ImageFeature(decode=False)).with_format(None)
        )
        # datasets 4 stores path and size of all files of an image folder here, which would be copied to each worker.
        self.dataset.info.download_checksums = None
        self.column = column
        self.split = split
        self.min_side = min_side
        self._warn = WarnOnce(split)
        self._shapes, self._starts, self._pixels = None, None, None
        if cache_gib > 0 and len(self) and self._estimated_bytes() <= cache_gib * GIB:
            self._fill_cache()

    @property
    def cached(self) -> bool:
        """Whether the decoded images are in memory."""
        return self._pixels is not None

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        """Read images as 8-bit RGB.

        Args:
            indices: indices of the images.

        Raises:
            ValueError: if an image cannot be decoded. The message also lists other images of the split that cannot.
        """
        if self.cached:
            return [self._read_cached(index) for index in indices]
        values = self.dataset[list(indices)][self.column]
        try:
            return [self._decode(value, index) for value, index in zip(values, indices, strict=True)]
        except UndecodableImageError as error:
            raise ValueError(f"{error}{self._describe_other_errors(error)}") from error

    def _read_cached(self, index: int) -> Image.Image:
        height, width = self._shapes[index]
        pixels = np.frombuffer(self._pixels, np.uint8, 3 * height * width, self._starts[index])
        return Image.fromarray(pixels.reshape(height, width, 3))

    def _estimated_bytes(self) -> float:
        """Estimate the size of all decoded images from a sample."""
        sample = np.unique(np.linspace(0, len(self) - 1, min(SIZE_ESTIMATE_SAMPLES, len(self))).astype(int)).tolist()
        images = self.read(sample)
        return sum(3 * image.width * image.height for image in images) / len(images) * len(self)

    def _fill_cache(self) -> None:
        # A single buffer avoids copies by reference counting in forked workers.
        pixels, shapes = bytearray(), np.empty((len(self), 2), dtype=np.int64)
        for start in tqdm(range(0, len(self), 256), desc=f"decoding {self.split}", delay=5):
            indices = range(start, min(start + 256, len(self)))
            for index, image in zip(indices, self.read(indices), strict=True):
                shapes[index] = image.height, image.width
                pixels += image.tobytes()
        self._shapes, self._pixels = shapes, pixels
        self._starts = np.concatenate([[0], np.cumsum(3 * shapes.prod(axis=1))])
        logger.info("Decoded images of split '%s' are cached: %.2f GiB.", self.split, len(pixels) / GIB)

    def _decode(self, value: dict[str, Any] | None, index: int) -> Image.Image:
        return decode_image(value, f"Image {index} of split '{self.split}'", self._warn, self.min_side)

    def _describe_other_errors(self, first: Exception) -> str:
        """Decode the split for up to `MAX_CHECK_SECONDS` and list all images that cannot be decoded.

        A check before training would take as long as a part of an epoch, and a check of the headers would miss
        truncated files. Therefore the check runs after the first error.
        """
        total = len(self)
        if total > 1:
            logger.warning("%s\nChecking the other images of the split for up to %d s.", first, MAX_CHECK_SECONDS)
        end, checked, failed = time.monotonic() + MAX_CHECK_SECONDS, 0, []
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            while checked < total and time.monotonic() < end:
                indices = range(checked, min(checked + 256, total))
                values = self.dataset[indices.start : indices.stop][self.column]
                failed += filter(None, pool.map(self._find_error, values, indices))
                checked = indices.stop
        if len(failed) < 2 and checked == total:
            return ""
        names = format_list(failed, MAX_SHOWN, str)
        extent = f"all {total}" if checked == total else f"the first {checked} of {total} ({MAX_CHECK_SECONDS} s)"
        return f" Of {extent} images of the split, {len(failed)} cannot be decoded" + (f": {names}." if names else ".")

    @staticmethod
    def _find_error(value: dict[str, Any] | None, index: int) -> str | None:
        """Return index and path of an image that cannot be decoded."""
        try:
            decode_image(value, "", lambda message: None)
        except UndecodableImageError:
            path = value and value.get("path")
            return f"{index} ({path})" if path else str(index)
        return None


class UndecodableImageError(ValueError):
    """Raised for an image that cannot be read or decoded."""


class WarnOnce:
    """Callable that logs one warning about the images of a split, in this process and its data loader workers."""

    def __init__(self, split: str) -> None:
        self.split = split
        # Shared memory, which workers can write.
        self._warned = torch.zeros((), dtype=torch.bool).share_memory_()

    def __call__(self, message: str) -> None:
        if not self._warned:
            self._warned.fill_(True)
            logger.warning("Images of split '%s' %s (Logged once; it may apply to other images.)", self.split, message)


def log_warning(message: str) -> None:
    """Log a warning about images of an unknown split."""
    logger.warning("Images %s", message)


def decode_image(
    value: dict[str, Any] | None, location: str, warn: Warn = log_warning, min_side: int | None = None
) -> Image.Image:
    """Decode a stored image as 8-bit RGB.

    Args:
        value: `{"bytes": ..., "path": ...}` with a local path, or one that `datasets` opens.
        location: name of the image, the beginning of the error message.
        warn: called with the assumed range of the values, if the file does not state it.
        min_side: as in `read_rgb`.

    Raises:
        ValueError: if the image cannot be read or decoded, or has NaN values.
    """
    try:
        if value is None:
            raise ValueError("there is no image (None)")
        path = value.get("path")
        named = f"such as {path} " if path else ""
        return read_rgb(value, lambda message: warn(named + message), min_side)
    # Pillow's decoders raise OSError, SyntaxError, struct.error and more.
    except Exception as error:
        path = f" ({value['path']})" if value and value.get("path") else ""
        hint = "Repair the file or remove the row from the dataset."
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        if isinstance(error, UnidentifiedImageError):
            reason = "Pillow cannot identify the file, so it is empty or no image"
        elif isinstance(error, Image.DecompressionBombError):
            hint = "Downscale the image."
        raise UndecodableImageError(f"{location}{path} cannot be decoded: {reason}. {hint}") from error


def read_rgb(value: dict[str, Any], warn: Warn = log_warning, min_side: int | None = None) -> Image.Image:
    """Read a stored image, apply its EXIF orientation and convert it to 8-bit RGB (see `convert_to_rgb`).

    The steps are those of `datasets.Image`. Additionally the range of the values is read from the header.

    Args:
        value: `{"bytes": ..., "path": ...}`.
        warn: called with the assumed range of the values, if the file does not state it.
        min_side: decode a JPEG at 1/2, 1/4 or 1/8 of its size if no side becomes shorter than this, in pixels. Large
            photographs decode several times as fast. None: the full size.
    """
    file = value.get("path") if value.get("bytes") is None else io.BytesIO(value["bytes"])
    if file is None or isinstance(file, str) and "://" in file:
        return convert_to_rgb(ImageFeature().decode_example(value), warn=warn)
    with Image.open(file) as image:
        stored = read_stored_values(image)
        if min_side is not None:
            image.draft(None, (min_side, min_side))
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation) is not None:
            image = ImageOps.exif_transpose(image)
        return convert_to_rgb(image, stored, warn)


def convert_to_rgb(image: Image.Image, stored: StoredValues | None = None, warn: Warn = log_warning) -> Image.Image:
    """Convert an image to 8-bit RGB like the image-classification pipeline of transformers. Alpha is dropped.

    Grayscale images with more than 8 bits are an exception: their range is scaled to 8 bits, whereas Pillow (and the
    pipeline) clips them at 255, which makes most of them white. Such files should be stored with 8 bits.

    Args:
        image: image of any mode.
        stored: range of the values in the file; None if it is unknown.
        warn: called with the assumed range, if it is unknown.
    """
    stored = stored or StoredValues(bits=16 if image.mode.startswith("I;16") else None)
    if is_deep(image):
        image = to_8_bits(image, stored, warn)
    elif stored.bits == 16:
        image = rescale_truncated(image, stored, warn)
    if image.mode == "P" and "transparency" in image.info:
        # A direct conversion to RGB gives the same colors, but a warning per image.
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
