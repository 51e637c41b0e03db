"""Images per second that one CPU core reads and augments, next to timm's loader on the same files."""

import io
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.loader import fast_collate

from ..data import DeviceTransform, ImageClassificationData, collate
from ..data.transforms import TrainTransform
from .timing import Timing, time_interleaved

REFERENCE = "timm"


def compare_with_timm(
    data: ImageClassificationData, augmentation: Mapping[str, Any], batch_size: int, *, rounds: int = 10
) -> dict[str, Timing]:
    """Measure the time for a batch in this process, with one thread, in turn.

    Both read the same encoded images and return 8-bit images, which the device normalizes, as timm's prefetcher does.
    With erasing before mixing, both normalize and erase here.

    Args:
        data: training images with a transform of `build_transforms`, without a cache.
        augmentation: arguments of `build_transforms`.
        batch_size: images of a batch.
        rounds: number of batches of each.

    Returns:
        Timings per batch: `ours`, and `timm`, the reference of the ratios.

    Raises:
        ValueError: if the images are not encoded bytes or files, or are cached.
    """
    if data.images.cached or data.labels is None:
        raise ValueError("The comparison reads encoded images with labels. Set `image_cache_gib` to 0.")
    positions = {"ours": count(), REFERENCE: count()}

    def next_indices(name: str) -> list[int]:
        return [next(positions[name]) % len(data) for _ in range(batch_size)]

    timm_batch = _timm_reader(data, augmentation)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return time_interleaved(
            {
                "ours": lambda: collate(data.__getitems__(next_indices("ours"))),
                REFERENCE: lambda: timm_batch(next_indices(REFERENCE)),
            },
            reference=REFERENCE,
            rounds=rounds,
        )
    finally:
        torch.set_num_threads(threads)


def _timm_reader(data: ImageClassificationData, augmentation: Mapping[str, Any]) -> Callable[[list[int]], object]:
    transform: TrainTransform = data.transform  # type: ignore[assignment]
    device_transform: DeviceTransform = transform.device_transform
    size = data[0]["pixel_values"].shape[-2:]  # type: ignore[union-attr]
    read = create_transform(
        input_size=(3, *size),
        is_training=True,
        use_prefetcher=transform.normalize_on_device,
        scale=tuple(augmentation["crop_scale"]),
        ratio=tuple(augmentation["crop_ratio"]),
        hflip=augmentation["hflip"],
        color_jitter=augmentation["color_jitter"],
        auto_augment=augmentation["auto_augment"],
        interpolation=augmentation["train_interpolation"] or "bilinear",
        mean=device_transform.mean,
        std=device_transform.std,
        re_prob=0.0 if augmentation["erase_after_mixing"] else augmentation["random_erasing"],
        re_mode=augmentation["erasing_mode"],
    )
    rows, column, labels = data.images.dataset, data.images.column, data.labels

    def read_batch(indices: list[int]) -> object:
        values = rows[indices][column]
        files = [value["path"] if value["bytes"] is None else io.BytesIO(value["bytes"]) for value in values]
        return fast_collate(
            [
                (read(Image.open(file).convert("RGB")), labels[index])
                for file, index in zip(files, indices, strict=True)
            ]
        )

    return read_batch
