"""Range of the values (black and white) of images with more than 8 bits per channel.

Pillow opens such grayscale images in the modes `I;16`, `I` (32-bit integers) and `F` (floats), and its conversion to 8
bits clips them at 255. The range is read from the file if possible: the TIFF tags BitsPerSample, MinSampleValue,
MaxSampleValue, SMinSampleValue and SMaxSampleValue, the PNG chunk sBIT, and the formats that Pillow scales to 16 bits
(PGM, JPEG 2000). Otherwise a range is assumed and logged as a warning.
"""

import io
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

PHOTOMETRIC, BITS_PER_SAMPLE, SAMPLE_FORMAT = 262, 258, 339
MIN_SAMPLE, MAX_SAMPLE, S_MIN_SAMPLE, S_MAX_SAMPLE = 280, 281, 340, 341
SIGNED, FLOAT = 2, 3
SCALED_FORMATS = ("PPM", "JPEG2000")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
HINT = "If that is wrong, store them with 8 bits, or as TIFF with the tags SMinSampleValue and SMaxSampleValue."

Warn = Callable[[str], None]


@dataclass(frozen=True)
class StoredValues:
    """Format of the values in a file.

    Args:
        bits: bits per channel; None if unknown.
        signed: whether the values are signed integers.
        inverted: whether the lowest value is white.
        low: value of black; None if the file does not state it.
        high: value of white; None if the file does not state it.
        significant_bits: number of significant bits of a 16-bit PNG file.
    """

    bits: int | None = None
    signed: bool = False
    inverted: bool = False
    low: float | None = None
    high: float | None = None
    significant_bits: int | None = None


def read_stored_values(image: Image.Image) -> StoredValues:
    """Read the format of the values from the header of an opened image. Call this before the pixels are loaded."""
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        return _from_tags(tags)
    deep = is_deep(image) or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    if not deep:
        return StoredValues()
    if image.format in SCALED_FORMATS and not image.mode.startswith("F"):
        return StoredValues(bits=16, low=0, high=65535)
    if image.format == "PNG":
        return StoredValues(bits=16, significant_bits=_significant_bits(image))
    return StoredValues(bits=16 if image.mode.startswith("I;16") else None)


def is_deep(image: Image.Image) -> bool:
    """Whether the mode of an image has more than 8 bits per channel."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def to_8_bits(image: Image.Image, stored: StoredValues, warn: Warn) -> Image.Image:
    """Convert an image with more than 8 bits per channel to the mode `L`.

    Args:
        image: image of the mode `I`, `F` or `I;16`.
        stored: format of the values in the file.
        warn: called with the assumed range, if it is unknown.

    Raises:
        ValueError: if values are NaN or infinite.
    """
    values = np.asarray(image, dtype=np.float64)
    if num_invalid := int(values.size - np.isfinite(values).sum()):
        raise ValueError(f"{num_invalid} of its {values.size} values are NaN or infinite")
    if stored.bits == 32 and not stored.signed and image.mode == "I":
        values = np.where(values < 0, values + 2**32, values)
    least, largest = float(values.min()), float(values.max())
    if stored.high is not None and stored.low <= least and largest <= stored.high:
        low, high = stored.low, stored.high
    elif image.mode == "F":
        low, high = _assume_float_range(least, largest, warn)
    else:
        low, high = _assume_integer_range(values, stored, warn)
    levels = np.clip((values - low) / (high - low), 0, 1)
    return Image.fromarray(np.rint(255 * (1 - levels if stored.inverted else levels)).astype(np.uint8))


def rescale_truncated(image: Image.Image, stored: StoredValues, warn: Warn) -> Image.Image:
    """Rescale an image with several channels of 16 bits, of which Pillow reads only the upper 8 bits.

    If the range needs few of these 8 bits, a warning is logged.

    Args:
        image: image as Pillow loads it.
        stored: format of the values in the file.
        warn: called with the problem.
    """
    if stored.bits != 16 or image.mode not in ("L", "LA", "RGB", "RGBA", "RGBX"):
        return image
    colors = image.getbands()[: 1 if image.mode.startswith("L") else 3]
    largest = max(extrema[1] for extrema in np.reshape(image.getextrema(), (-1, 2))[: len(colors)].tolist())
    high = stored.high
    if high is None or not int(largest) << 8 <= high < 65535:
        if largest < 16:
            warn(
                "with 16 bits per channel have values below 4096 of 65535 only, so they are almost black. Pillow "
                "reads the upper 8 of these bits. If their range is smaller, store them with 8 bits per channel."
            )
        return image
    warn(
        f"have a range of 0 to {high:g} in 16 bits per channel, of which Pillow reads the upper 8, so they get few "
        "different levels. Store them with 8 bits per channel."
    )
    scale = 65535 / high
    bands = [band.point(lambda v: min(255, round(v * scale))) for band in image.split()[: len(colors)]]
    return Image.merge(image.mode, [*bands, *image.split()[len(colors) :]])


def _from_tags(tags: Any) -> StoredValues:
    def first(tag: int, default: Any = None) -> Any:
        value = tags.get(tag, default)
        if isinstance(value, tuple):
            value = value[0] if value else default
        return value

    bits, kind = first(BITS_PER_SAMPLE, 1), first(SAMPLE_FORMAT, 1)
    low, high = (
        _first_finite_number(first(a), first(b)) for a, b in ((S_MIN_SAMPLE, MIN_SAMPLE), (S_MAX_SAMPLE, MAX_SAMPLE))
    )
    if high is None and kind not in (SIGNED, FLOAT) and 8 < bits < 16:
        high = 2**bits - 1
    if high is not None and low is None and kind not in (SIGNED, FLOAT):
        low = 0.0
    if low is None or high is None or not low < high:
        low = high = None
    return StoredValues(bits, kind == SIGNED, first(PHOTOMETRIC, 1) == 0, low, high)


def _first_finite_number(*values: Any) -> float | None:
    """Return the first value that is a finite number."""
    for value in values:
        try:
            number = float(value)
        except (TypeError, ValueError, ZeroDivisionError):
            continue
        if math.isfinite(number):
            return number
    return None


def _assume_float_range(least: float, largest: float, warn: Warn) -> tuple[float, float]:
    for low, high in ((0, 1), (-1, 1), (0, 255), (0, 65535)):
        if low <= least and largest <= high:
            break
    else:
        low, high = least, largest
    found = f"hold floats from {least:g} to {largest:g}"
    warn(f"{found}, and the file does not state the range: {low:g} is read as black and {high:g} as white. {HINT}")
    return low, high if high > low else low + 1


def _assume_integer_range(values: np.ndarray, stored: StoredValues, warn: Warn) -> tuple[float, float]:
    least, largest = float(values.min()), float(values.max())
    bits = stored.significant_bits
    if bits is not None and bits < 16 and largest < 2**bits and not _fills_16_bits(values, bits):
        return 0, 2**bits - 1
    unsigned_16 = stored.bits == 16 and not stored.signed
    if least < 0:
        high = next(limit for limit in (127, 32767, 2**31 - 1) if max(largest, -least - 1) <= limit)
        low = -high - 1
    else:
        low, maximum = 0, 32767 if stored.bits == 16 and stored.signed else 65535
        high = next(limit for limit in (255, maximum, 2**31 - 1, 2**32 - 1) if largest <= limit)
    # Files with 16 unsigned bits usually use the complete range, unless the values are small.
    if not unsigned_16 or largest < 4096:
        found = f"hold integers from {least:g} to {largest:g}" + (f" in {stored.bits} bits" if stored.bits else "")
        warn(f"{found}, and the file states no other range: {low} is read as black and {high} as white. {HINT}")
    return low, high


def _fills_16_bits(values: np.ndarray, bits: int) -> bool:
    """Whether values were scaled from the significant bits to 16 bits, as the PNG specification requires."""
    maximum = 2**bits - 1
    measured = np.rint(values * maximum / 65535)
    scaled = measured * 65535 / maximum
    roundings = (np.rint(scaled), np.floor(scaled), measured * 2 ** (16 - bits))
    return bool(np.any([values == rounding for rounding in roundings], axis=0).all())


def _significant_bits(image: Image.Image) -> int | None:
    """Read the smallest number of the sBIT chunk, which Pillow does not read."""
    file = image.fp
    position = file.tell()
    try:
        file.seek(0)
        if file.read(8) != PNG_SIGNATURE:
            return None
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind == b"sBIT":
                return min(file.read(length), default=None)
            if kind in (b"IDAT", b"IEND"):
                return None
            file.seek(length + 4, io.SEEK_CUR)
        return None
    finally:
        file.seek(position)
