"""The images of a split, read as RGB: decoded at every reading, or once and kept in memory where they fit."""

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

from .value_range import StoredValues, Warn, is_deep, rescale_truncated, stored_values, to_8_bits

logger = logging.getLogger(__name__)

GIB = 2**30
SIZE_ESTIMATE_SAMPLES = 32
SECONDS_TO_CHECK = 60
SHOWN = 10


class ImageReader:
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
        self._warn = WarnOnce(split)
        self._shapes, self._starts, self._pixels = None, None, None
        if cache_gib > 0 and len(self) and self._estimated_bytes() <= cache_gib * GIB:
            self._fill_cache()

    @property
    def cached(self) -> bool:
        """Whether the decoded images lie in memory."""
        return self._pixels is not None

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        """The images at these places, as 8-bit RGB.

        Raises:
            ValueError: an image cannot be read or decoded. Names it, and the other images of the split like it.
        """
        if self.cached:
            return [self._read_cached(index) for index in indices]
        values = self.rows[list(indices)][self.column]
        try:
            return [self._decode(value, index) for value, index in zip(values, indices, strict=True)]
        except UndecodableImageError as error:
            raise ValueError(f"{error}{self._other_broken_images(error)}") from error

    def _read_cached(self, index: int) -> Image.Image:
        height, width = self._shapes[index]
        pixels = np.frombuffer(self._pixels, np.uint8, 3 * height * width, self._starts[index])
        return Image.fromarray(pixels.reshape(height, width, 3))

    def _estimated_bytes(self) -> float:
        """Bytes that all decoded images take, judged by a sample."""
        sample = np.unique(np.linspace(0, len(self) - 1, min(SIZE_ESTIMATE_SAMPLES, len(self))).astype(int)).tolist()
        images = self.read(sample)
        return sum(3 * image.width * image.height for image in images) / len(images) * len(self)

    def _fill_cache(self) -> None:
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
        return decode(value, self._place(index), self._warn)

    def _place(self, index: int) -> str:
        return f"Image {index} of split '{self.split}'"

    def _other_broken_images(self, first: Exception) -> str:
        """Decode the split, for `SECONDS_TO_CHECK` at most, and list what else is broken: one repair instead of many.

        A check of every image before training would take as long as a part of an epoch, and one of their headers
        misses truncated files, so the check waits for the first failure.
        """
        total = len(self)
        if total > 1:
            logger.warning("%s\nChecking the other images of the split for up to %d s.", first, SECONDS_TO_CHECK)
        end, checked, broken = time.monotonic() + SECONDS_TO_CHECK, 0, []
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            while checked < total and time.monotonic() < end:
                indices = range(checked, min(checked + 256, total))
                values = self.rows[indices.start : indices.stop][self.column]
                broken += filter(None, pool.map(self._broken, values, indices))
                checked = indices.stop
        if len(broken) < 2 and checked == total:
            return ""
        names = ", ".join(broken[:SHOWN]) + (", ..." if len(broken) > SHOWN else "")
        extent = f"all {total}" if checked == total else f"the first {checked} of {total} ({SECONDS_TO_CHECK} s)"
        return f" Of {extent} images of the split, {len(broken)} cannot be decoded" + (f": {names}." if names else ".")

    def _broken(self, value: dict[str, Any] | None, index: int) -> str | None:
        try:
            decode(value, "", lambda message: None)
        except UndecodableImageError:
            path = value and value.get("path")
            return f"{index} ({path})" if path else str(index)
        return None


class UndecodableImageError(ValueError):
    """An image that cannot be read or decoded."""


class WarnOnce:
    """Log a warning about the images of one split once, in this process and in its DataLoader workers."""

    def __init__(self, split: str) -> None:
        self.split = split
        # In shared memory, which workers write to as well.
        self._warned = torch.zeros((), dtype=torch.bool).share_memory_()

    def __call__(self, message: str) -> None:
        if not self._warned:
            self._warned.fill_(True)
            logger.warning("Images of split '%s' %s (Logged once, other images may be alike.)", self.split, message)


def log_warning(message: str) -> None:
    """Log a warning about images of no known split."""
    logger.warning("Images %s", message)


def decode(value: dict[str, Any] | None, place: str, warn: Warn = log_warning) -> Image.Image:
    """A stored image, `{"bytes", "path"}`, as 8-bit RGB.

    Args:
        value: the image. A path is that of a local file, or one that `datasets` opens.
        place: where it is, for error messages.
        warn: called with what is assumed about the range of its values, where the file does not state it.

    Raises:
        ValueError: it cannot be read or decoded, or its values have NaN. Begins with `place`.
    """
    try:
        if value is None:
            raise ValueError("there is no image (None)")
        path = value.get("path")
        named = f"such as {path} " if path else ""
        return read_rgb(value, lambda message: warn(named + message))
    # Pillow's decoders raise OSError, SyntaxError, struct.error and more.
    except Exception as error:
        path = f" ({value['path']})" if value and value.get("path") else ""
        hint = "Repair the file or remove the row from the data set."
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        if isinstance(error, UnidentifiedImageError):
            reason = "Pillow cannot identify it, so it is empty or no image"
        elif isinstance(error, Image.DecompressionBombError):
            hint = "Store it smaller: a model reads but a few hundred pixels a side."
        raise UndecodableImageError(f"{place}{path} cannot be decoded: {reason}. {hint}") from error


def read_rgb(value: dict[str, Any], warn: Warn = log_warning) -> Image.Image:
    """Open a stored image, turn it by its EXIF orientation and convert it to 8-bit RGB (see `convert_to_rgb`).

    The steps are those of `datasets.Image`. The file's header is read on the way, for the range of its values.
    """
    source = value.get("path") if value.get("bytes") is None else io.BytesIO(value["bytes"])
    if source is None or isinstance(source, str) and "://" in source:
        return convert_to_rgb(ImageFeature().decode_example(value), warn=warn)
    with Image.open(source) as image:
        stored = stored_values(image)
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation) is not None:
            image = ImageOps.exif_transpose(image)
        return convert_to_rgb(image, stored, warn)


def convert_to_rgb(image: Image.Image, stored: StoredValues | None = None, warn: Warn = log_warning) -> Image.Image:
    """Any image as 8-bit RGB, as the image-classification pipeline of transformers does it (alpha is dropped).

    Except for gray images of more than 8 bits: their range is scaled to 8 bits here, whereas Pillow, and with it the
    pipeline, clips them at 255, which turns most of them white. Such files are better stored with 8 bits.

    Args:
        image: the image, of any mode.
        stored: how its file stores the values; None: not known.
        warn: called with what is assumed about the range, where that is not known.
    """
    stored = stored or StoredValues(bits=16 if image.mode.startswith("I;16") else None)
    if is_deep(image):
        image = to_8_bits(image, stored, warn)
    elif stored.bits == 16:
        image = rescale_truncated(image, stored, warn)
    if image.mode == "P" and "transparency" in image.info:
        # Straight to RGB gives the same colours and a warning per image.
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
