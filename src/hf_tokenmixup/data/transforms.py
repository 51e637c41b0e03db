"""Image transforms: timm augmentation for training, the image processor for evaluation.

The augmentation is `timm.data.create_transform` with the size and normalization of the model's image processor. The
evaluation calls the image processor, so that the exported model has the same accuracy in
`pipeline("image-classification")`.
"""

import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, posterize
from torchvision.transforms import Compose, InterpolationMode, RandomChoice, Resize
from transformers import TimmWrapperImageProcessor

from .device_transform import DeviceTransform

logger = logging.getLogger(__name__)

SeedFn = Callable[[int, int], None]
# Filters that both timm's crop and its policies know.
TRAIN_INTERPOLATIONS = ("random", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


class BatchTransform(ABC):
    """Base class of transforms that process several images together.

    `transform(image)` returns a (3, H, W) tensor, `transform.batch(images)` the same tensors as (B, 3, H, W).
    """

    uses_numpy_rng = False

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.batch([image])[0]

    @abstractmethod
    def batch(self, images: Sequence[Image.Image], seed_fn: SeedFn | None = None) -> torch.Tensor:
        """Transform the images of a batch.

        Args:
            images: RGB images of any size.
            seed_fn: called as `seed_fn(position, stream)` before random draws for the image at this position of the
                batch. The seeds of different streams are independent.

        Returns:
            (B, 3, H, W) tensor.
        """


class ImageProcessorTransform(BatchTransform):
    """Transform that calls the image processor of a model."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor

    def batch(self, images: Sequence[Image.Image], seed_fn: SeedFn | None = None) -> torch.Tensor:
        return self.image_processor(images=list(images), return_tensors="pt")["pixel_values"]


class TrainTransform(BatchTransform):
    """Training transform: augmentation per image, normalization per batch, and random erasing per image.

    Args:
        augment: function from an RGB PIL image to a PIL image of the output size.
        device_transform: normalization, and steps that the trainer applies on the device.
        random_erasing: function that changes a normalized image (3, H, W) in place.
        uses_numpy_rng: whether `augment` draws from numpy's global generator.
        normalize_on_device: return 8-bit images, which the trainer normalizes by `device_transform`.
        min_side: shortest side, in pixels, of an image from which no crop has to be enlarged; None: unknown.
    """

    def __init__(
        self,
        augment: Callable[[Image.Image], Image.Image],
        device_transform: DeviceTransform,
        random_erasing: Callable[[torch.Tensor], Any] | None = None,
        uses_numpy_rng: bool = True,
        normalize_on_device: bool = False,
        min_side: int | None = None,
    ) -> None:
        self.augment = augment
        self.min_side = min_side
        self.device_transform = device_transform
        self.normalize_on_device = normalize_on_device
        self.random_erasing = random_erasing
        self.uses_numpy_rng = uses_numpy_rng

    def batch(self, images: Sequence[Image.Image], seed_fn: SeedFn | None = None) -> torch.Tensor:
        pixels = []
        for position, image in enumerate(images):
            if seed_fn is not None:
                seed_fn(position, 0)
            pixels.append(np.ascontiguousarray(np.asarray(self.augment(image)).transpose(2, 0, 1)))
        batch = torch.from_numpy(np.stack(pixels))
        if self.normalize_on_device:
            return batch
        batch = self.device_transform.normalize(batch)
        if self.random_erasing is not None:
            for position, image in enumerate(batch):
                if seed_fn is not None:
                    seed_fn(position, 1)
                self.random_erasing(image)
        return batch


def build_transforms(
    image_processor: Any,
    *,
    crop_scale: Sequence[float] = (0.08, 1.0),
    crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    color_jitter: float | Sequence[float] | None = None,
    auto_augment: str | None = None,
    random_erasing: float = 0.0,
    erasing_mode: str = "pixel",
    erase_after_mixing: bool = False,
    train_interpolation: str | None = None,
    normalize_on_device: bool = False,
) -> tuple[TrainTransform, ImageProcessorTransform]:
    """Build the training and evaluation transforms, from RGB PIL images of any size to (3, H, W) float32 tensors.

    Some steps can run on the device instead, for complete batches: pass `train_transform.device_transform` to
    `TokenMixupTrainer` then, or call its methods in a training loop.

    Args:
        image_processor: image processor of transformers that resizes every image to the same size.
        crop_scale: minimum and maximum area of a random crop as a fraction of the image. (1, 1) resizes the complete
            image.
        crop_ratio: minimum and maximum width-to-height ratio of a random crop.
        hflip: probability of a horizontal flip.
        color_jitter: strength of brightness, contrast and saturation: one number, three numbers, or four with hue.
        auto_augment: policy string of timm, such as `rand-m9-mstd0.5-inc1`. timm then ignores `color_jitter`, except
            for `3a` policies.
        random_erasing: probability that one rectangle is erased after normalization.
        erasing_mode: content of the rectangle: `pixel` (noise), `rand` (one random color) or `const` (zero).
        erase_after_mixing: erase on the device, after mixup and CutMix, instead of before. The rectangles then depend
            on the order of the batches, as other random numbers of training do.
        train_interpolation: of the crop and of geometric augmentation: a name of Pillow's filters, or `random`
            (bilinear or bicubic for each image); None: that of the image processor.
        normalize_on_device: the training transform returns 8-bit images. If it erases before mixing, it normalizes
            nevertheless.

    Returns:
        The training transform and the evaluation transform, which calls the image processor.

    Raises:
        ValueError: if a setting is out of range, the policy is unknown, or the image processor returns images of
            different sizes.
    """
    _validate_range("crop_scale", crop_scale, 0, 1)
    _validate_range("crop_ratio", crop_ratio, 0, float("inf"))
    _validate_probability("hflip", hflip)
    _validate_probability("random_erasing", random_erasing)
    if erasing_mode not in ("pixel", "rand", "const"):
        raise ValueError(f"erasing_mode must be 'pixel', 'rand' or 'const', got {erasing_mode!r}.")
    if train_interpolation not in (None, *TRAIN_INTERPOLATIONS):
        raise ValueError(
            f"train_interpolation must be one of {', '.join(TRAIN_INTERPOLATIONS)}, or None for that of the image "
            f"processor, got {train_interpolation!r}."
        )
    _validate_color_jitter(color_jitter)
    # timm ignores parts of a policy that it cannot parse.
    if invalid := [part for part in (auto_augment or "").split("-")[1:] if not re.match(r"[a-z]+\d", part)]:
        raise ValueError(
            f"auto_augment must be a policy of timm such as 'rand-m9-mstd0.5-inc1', got {auto_augment!r}: "
            f"{', '.join(map(repr, invalid))} must be a name and a number, such as 'm9'."
        )
    if color_jitter and auto_augment and "3a" not in auto_augment:
        logger.warning("color_jitter=%s is ignored, since auto_augment=%r replaces it.", color_jitter, auto_augment)

    eval_transform = ImageProcessorTransform(image_processor)
    size, mean, std = infer_image_processor_config(image_processor)
    interpolation = _interpolation(image_processor) if train_interpolation is None else train_interpolation
    try:
        crop, policy, postprocess = create_transform(
            input_size=(3, *size),
            is_training=True,
            scale=tuple(crop_scale),
            ratio=tuple(crop_ratio),
            hflip=hflip,
            color_jitter=color_jitter,
            auto_augment=auto_augment,
            interpolation=interpolation,
            mean=mean,
            std=std,
            re_prob=random_erasing,
            re_mode=erasing_mode,
            separate=True,
        )
    # timm raises these errors for invalid policy strings.
    except (AssertionError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        if auto_augment is None:
            raise
        raise ValueError(
            f"auto_augment must be a policy of timm such as 'rand-m9-mstd0.5-inc1', 'augmix-m5-w4-d2', 'original' or "
            f"'3a', got {auto_augment!r} ({type(error).__name__}: {error})."
        ) from error
    if crop_scale[0] == crop_scale[1] == 1:
        # A crop of timm with scale 1 still cuts images whose shape is outside of crop_ratio.
        crop.transforms[0] = _build_resize(size, interpolation)
    augment = Compose(crop.transforms + policy.transforms)
    clamp_posterize_bits(augment)
    # The first of these steps converts to a tensor in [0, 1]. `TrainTransform` does this for the complete batch.
    _, normalize, *erasing = postprocess.transforms
    erasing_in_worker, erasing_on_device = erasing[0] if erasing else None, None
    if erase_after_mixing:
        erasing_in_worker, erasing_on_device = None, erasing_in_worker
    train_transform = TrainTransform(
        augment,
        DeviceTransform(normalize.mean, normalize.std, erasing_on_device),
        erasing_in_worker,
        # Of the transforms of timm, only the policies draw from numpy.
        uses_numpy_rng=auto_augment is not None,
        normalize_on_device=normalize_on_device and erasing_in_worker is None,
        # The shortest side of the smallest crop of a square image of side s is s * sqrt(scale * ratio).
        min_side=math.ceil(max(size) / math.sqrt(crop_scale[0] * min(crop_ratio[0], 1 / crop_ratio[1]))),
    )
    return train_transform, eval_transform


def infer_image_processor_config(
    image_processor: Any,
) -> tuple[tuple[int, int], tuple[float, float, float], tuple[float, float, float]]:
    """Infer the output size and the normalization of an image processor.

    The function processes a black and a white image, since attributes differ between image processors (`size` and
    `crop_size`, `do_rescale`, `crop_pct`).

    Args:
        image_processor: image processor of transformers.

    Returns:
        Height and width in pixels; mean and standard deviation per channel for pixels in [0, 1].

    Raises:
        ValueError: if the output is not (3, H, W), or its size depends on the shape of the image.
    """
    transform = ImageProcessorTransform(image_processor)
    black = transform(Image.new("RGB", (96, 64), "black"))
    white = transform(Image.new("RGB", (64, 96), "white"))
    if black.shape != white.shape or black.ndim != 3 or black.shape[0] != 3:
        raise ValueError(
            "The image processor must resize every image to the same size (3, H, W), but a wide and a tall image "
            f"became {tuple(black.shape)} and {tuple(white.shape)}. Set do_resize=True and a size of height and "
            "width, or a shortest_edge with a center crop."
        )
    height, width = black.shape[-2:]
    # The center is never padded.
    offset = black[:, height // 2, width // 2].double()
    slope = white[:, height // 2, width // 2].double() - offset
    if not (slope > 0).all():
        raise ValueError(
            f"The image processor must map white to higher values than black, but it maps black to {offset.tolist()} "
            f"and white to {(slope + offset).tolist()}. Correct its image_std and rescale_factor."
        )
    return (height, width), tuple((-offset / slope).tolist()), tuple((1 / slope).tolist())


def resize_image_processor(image_processor: Any, height: int, width: int) -> None:
    """Change the output size of an image processor in place.

    A shortest edge before a center crop is scaled with the crop, so that the same fraction of the image is cropped.

    Args:
        image_processor: image processor of transformers.
        height: height in pixels.
        width: width in pixels.

    Raises:
        ValueError: if the image processor does not support this size.
    """
    (old_height, old_width), *_ = infer_image_processor_config(image_processor)
    if (old_height, old_width) == (height, width):
        return
    if isinstance(image_processor, TimmWrapperImageProcessor):
        image_processor.data_config["input_size"] = (3, height, width)
        image_processor.val_transforms = create_transform(**image_processor.data_config, is_training=False)
        return
    new_size, stored = {"height": height, "width": width}, image_processor.to_dict()
    changes = {"size": new_size}
    if stored.get("do_center_crop") and stored.get("crop_size"):
        ratio = max(height / old_height, width / old_width)
        resized = {edge: max(1, round(pixels * ratio)) for edge, pixels in dict(stored["size"]).items() if pixels}
        changes = {"size": resized, "crop_size": new_size}
    elif "shortest_edge" in dict(stored.get("size") or {}) and height == width:
        changes = {"size": {"shortest_edge": height}}
    for name, value in changes.items():
        current = getattr(image_processor, name)
        # Some versions of transformers store sizes as objects.
        setattr(image_processor, name, value if isinstance(current, dict) else type(current)(**value))
    try:
        found = "{}x{}".format(*infer_image_processor_config(image_processor)[0])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        found = f"none ({error})"
    if found != f"{height}x{width}":
        raise ValueError(
            f"The {type(image_processor).__name__} cannot be set to {height}x{width} pixels: its output size is then "
            f"{found}. Set the size in its preprocessor_config.json, or choose another image processor."
        )


def clamp_posterize_bits(transform: Compose) -> None:
    """Clamp the bits of timm's posterize operations to at least one bit per channel, in place.

    At a magnitude of 10 (2.3% of the draws of `m9-mstd0.5`, one of 660 images) timm requests 0 bits. Pillow 12 makes
    the image black, Pillow 13 raises an error. The clamp changes nothing else, whereas `-mmax9` in the policy string
    would reduce half of all magnitudes to 9.
    """
    for op in _augment_ops(getattr(transform, "transforms", [])):
        if op.aug_fn is posterize:
            op.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    return posterize(image, max(1, bits_to_keep), **kwargs)


def _augment_ops(node: Any) -> list[AugmentOp]:
    """Return the operations of RandAugment and AugMix (`ops`) and of AutoAugment (`policy`, a list of lists)."""
    if isinstance(node, AugmentOp):
        return [node]
    if isinstance(node, list | tuple):
        return [op for item in node for op in _augment_ops(item)]
    inner = getattr(node, "ops", None) or getattr(node, "policy", None)
    return _augment_ops(list(inner)) if isinstance(inner, list | tuple | np.ndarray) else []


def _build_resize(size: tuple[int, int], interpolation: str) -> Callable[[Image.Image], Image.Image]:
    if interpolation != "random":
        return Resize(size, interpolation=InterpolationMode(interpolation), antialias=True)
    modes = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
    return RandomChoice([Resize(size, interpolation=mode, antialias=True) for mode in modes])


def _interpolation(image_processor: Any) -> str:
    resample = getattr(image_processor, "resample", None)
    if resample is None:
        return "bilinear"
    if isinstance(resample, InterpolationMode):
        return resample.value
    return Image.Resampling(int(resample)).name.lower()


def _validate_range(name: str, value: Sequence[float], low: float, high: float) -> None:
    if len(value) != 2 or not (low < value[0] <= value[1] <= high and math.isfinite(value[1])):
        limit = f"at most {high}" if math.isfinite(high) else "finite"
        raise ValueError(f"{name} must be two numbers a <= b, above {low} and {limit}, got {tuple(value)}.")


def _validate_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a probability between 0 and 1, got {value}.")


def _validate_color_jitter(value: float | Sequence[float] | None) -> None:
    if value is None:
        return
    strengths = tuple(value) if isinstance(value, Sequence) else (value,)
    if isinstance(value, Sequence) and len(strengths) not in (3, 4) or any(not v >= 0 for v in strengths):
        raise ValueError(f"color_jitter must be one, three or four numbers of at least 0, got {value}.")
    if len(strengths) == 4 and strengths[3] > 0.5:
        raise ValueError(f"The fourth number of color_jitter, the hue, must be at most 0.5, got {strengths[3]}.")
