"""Corruptions of the images of an evaluation: noise, blur, JPEG, pixelation, contrast and brightness.

A corruption is applied to the RGB image between the image processor's resizing and its normalization, so that its
strength does not depend on the resolution of the file. The severities have the constants of CIFAR-10-C for images
below 96 pixels and those of ImageNet-C above (Hendrycks and Dietterich, Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations, ICLR 2019). The operations are those of torchvision, so accuracies are comparable
with each other, but not with accuracies on the published files.
"""

import copy
import hashlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import GaussianNoise
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2.functional import InterpolationMode

from ..data import ImageClassificationData, ImageClassificationIterableDataset
from ..data.dataset import fork_rngs, seed_rngs
from ..data.transforms import BatchTransform, ImageProcessorTransform, SeedFn, infer_image_processor_config
from ..utils.text import format_list

NUM_SEVERITIES = 5
# The shorter side in pixels from which the constants of ImageNet-C are used.
MIN_LARGE_SIDE = 96


@dataclass(frozen=True)
class Corruption:
    """A corruption of 8-bit images.

    Attributes:
        apply_fn: Function of an image, (3, H, W) uint8, and a constant; returns such an image.
        small: Constants of the severities 1 to 5 for small images, as in CIFAR-10-C.
        large: Constants of the severities 1 to 5 for large images, as in ImageNet-C.
    """

    apply_fn: Callable[[torch.Tensor, float], torch.Tensor]
    small: tuple[float, ...]
    large: tuple[float, ...]


def _gaussian_noise(image: torch.Tensor, sigma: float) -> torch.Tensor:
    noisy = GaussianNoise(sigma=sigma)(F.to_dtype(image, torch.float32, scale=True))
    return F.to_dtype(noisy, torch.uint8, scale=True)


def _gaussian_blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    # The padding reflects the image, so the kernel cannot be larger than it.
    radius = min(math.ceil(3 * sigma), min(image.shape[-2:]) - 1)
    return F.gaussian_blur(image, [2 * radius + 1] * 2, [sigma] * 2)


def _jpeg(image: torch.Tensor, quality: float) -> torch.Tensor:
    # torchvision deprecates its encoder.
    file = io.BytesIO()
    F.to_pil_image(image).save(file, "JPEG", quality=int(quality))
    return F.pil_to_tensor(Image.open(file))


def _pixelate(image: torch.Tensor, scale: float) -> torch.Tensor:
    height, width = image.shape[-2:]
    # Only for PIL images torchvision has the box filter, which averages the pixels of a block.
    resized = F.to_pil_image(image)
    for size in ([max(1, int(height * scale)), max(1, int(width * scale))], [height, width]):
        resized = F.resize(resized, size, interpolation=InterpolationMode.BOX)
    return F.pil_to_tensor(resized)


# A factor of brightness adds the constant of the benchmarks to a channel value of 0.5.
CORRUPTIONS = {
    "gaussian_noise": Corruption(_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.1), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "gaussian_blur": Corruption(_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0), (1.0, 2.0, 3.0, 4.0, 6.0)),
    "jpeg": Corruption(_jpeg, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
    "pixelate": Corruption(_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "contrast": Corruption(F.adjust_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "brightness": Corruption(F.adjust_brightness, (1.1, 1.2, 1.3, 1.4, 1.6), (1.2, 1.4, 1.6, 1.8, 2.0)),
}


@dataclass(frozen=True)
class CorruptionResult:
    """Result of an evaluation on corrupted images.

    Attributes:
        name: Name of the corruption.
        severity: Severity, 1 to 5.
        top1: Top-1 accuracy in [0, 1].
        loss: Mean cross-entropy in nats.
        calibration_error: Expected calibration error in [0, 1].
    """

    name: str
    severity: int
    top1: float
    loss: float
    calibration_error: float


def average_corruptions(results: Sequence[CorruptionResult]) -> CorruptionResult:
    """Return the means over corruptions, all of the same severity."""
    names = ("top1", "loss", "calibration_error")
    return CorruptionResult(
        "mean", results[0].severity, *(mean(getattr(result, name) for result in results) for name in names)
    )


def validate_corruptions(names: Sequence[str], severity: int) -> None:
    """Check names and severity of corruptions.

    Raises:
        ValueError: A name is unknown or repeated, or the severity is not between 1 and 5.
    """
    if unknown := [name for name in names if name not in CORRUPTIONS]:
        raise ValueError(f"There is no corruption {format_list(unknown)}. Corruptions: {', '.join(CORRUPTIONS)}.")
    if len(set(names)) < len(names):
        raise ValueError(f"The corruptions must be different, got {' '.join(names)}.")
    if not 1 <= severity <= NUM_SEVERITIES:
        raise ValueError(f"The severity of corruptions must be between 1 and {NUM_SEVERITIES}, got {severity}.")


class CorruptedTransform(BatchTransform):
    """Transform that calls an image processor and corrupts its image before the normalization.

    A corruption draws random numbers by a seed that depends on `seed` and on the pixels of the image that is read.
    Its result does not depend on the order, the batch size, the workers or the processes, and all models see the same
    noise.

    Args:
        image_processor: Image processor of transformers.
        name: Name of the corruption, a key of `CORRUPTIONS`.
        severity: Severity, 1 to 5.
        seed: Seed of the random numbers.

    Raises:
        ValueError: The name or the severity does not exist.
    """

    def __init__(self, image_processor: Any, name: str, severity: int = 3, seed: int = 42) -> None:
        validate_corruptions([name], severity)
        self.name, self.severity, self.seed = name, severity, seed
        self._transform = ImageProcessorTransform(image_processor)
        size, image_mean, image_std = infer_image_processor_config(image_processor)
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in (image_mean, image_std))
        corruption = CORRUPTIONS[name]
        constants = corruption.small if min(size) < MIN_LARGE_SIDE else corruption.large
        self._apply_fn, self._constant = corruption.apply_fn, constants[severity - 1]

    def batch(self, images: Sequence[Image.Image], seed_fn: SeedFn | None = None) -> torch.Tensor:
        """Transform images as the image processor does, with the corruption.

        Args:
            images: RGB images of any size.
            seed_fn: Unused: the seeds depend on the images.
        """
        batch = self._transform.batch(images)
        with fork_rngs(include_numpy=False):
            corrupted = [self._corrupt(*pair) for pair in zip(images, batch, strict=True)]
        return torch.stack(corrupted).to(batch.dtype)

    def _corrupt(self, image: Image.Image, pixels: torch.Tensor) -> torch.Tensor:
        digest = hashlib.blake2b(np.asarray(image).tobytes(), digest_size=8).digest()
        seed_rngs(False, self.seed, int.from_bytes(digest, "little"))
        rgb = (255 * (pixels * self._std + self._mean)).round().clamp(0, 255).to(torch.uint8)
        return (self._apply_fn(rgb, self._constant).float() / 255 - self._mean) / self._std


def with_transform(
    data: ImageClassificationData | ImageClassificationIterableDataset, transform: BatchTransform
) -> ImageClassificationData | ImageClassificationIterableDataset:
    """Return the same split with another transform, for an evaluation."""
    changed = copy.copy(data)
    changed.transform = transform
    return changed
