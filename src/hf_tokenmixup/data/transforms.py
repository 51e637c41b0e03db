"""From PIL images to the normalised tensors that the model reads: augmented for training, plain for evaluation.

Augmentation is timm's (`timm.data.create_transform`). Sizes and normalisation are those of the model's image
processor. Evaluation calls the image processor itself, so that it measures what `pipeline("image-classification")`
will do with the published model.
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
from torchvision.transforms import Compose, InterpolationMode, Resize

logger = logging.getLogger(__name__)

SeedFn = Callable[[int, int], None]


class BatchTransform(ABC):
    """A transform of RGB images that does together what need not be done one by one.

    `transform(image)` gives a (3, H, W) float tensor, `transform.batch(images)` the same tensors as (B, 3, H, W).
    """

    uses_numpy_rng = False

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.batch([image])[0]

    @abstractmethod
    def batch(self, images: Sequence[Image.Image], reseed: SeedFn | None = None) -> torch.Tensor:
        """All images of a batch together.

        Args:
            images: RGB images of any sizes.
            reseed: called as `reseed(position, stream)` before anything is drawn for the image at that position of
                the batch; seeds of different streams are independent of each other.
        """


class ImageProcessorTransform(BatchTransform):
    """The image processor of a model."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor

    def batch(self, images: Sequence[Image.Image], reseed: SeedFn | None = None) -> torch.Tensor:
        return self.image_processor(images=list(images), return_tensors="pt")["pixel_values"]


class TrainTransform(BatchTransform):
    """Augmentation image by image, normalisation as a batch, random erasing of normalised images.

    Args:
        augment: from an RGB PIL image to one of the output size.
        normalize: of images in [0, 1], (B, 3, H, W).
        erase: changes a (3, H, W) image in place.
        uses_numpy_rng: whether `augment` draws from numpy's global generator.
    """

    def __init__(
        self,
        augment: Callable[[Image.Image], Image.Image],
        normalize: Callable[[torch.Tensor], torch.Tensor],
        erase: Callable[[torch.Tensor], Any] | None = None,
        uses_numpy_rng: bool = True,
    ) -> None:
        self.augment = augment
        self.normalize = normalize
        self.erase = erase
        self.uses_numpy_rng = uses_numpy_rng

    def batch(self, images: Sequence[Image.Image], reseed: SeedFn | None = None) -> torch.Tensor:
        pixels = []
        for position, image in enumerate(images):
            if reseed is not None:
                reseed(position, 0)
            pixels.append(np.asarray(self.augment(image)))
        batch = self.normalize(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous().float().div_(255))
        if self.erase is not None:
            for position, image in enumerate(batch):
                if reseed is not None:
                    reseed(position, 1)
                self.erase(image)
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
) -> tuple[TrainTransform, ImageProcessorTransform]:
    """Training and evaluation transforms, both from RGB PIL images of any size to (3, H, W) float32 tensors.

    Args:
        image_processor: a transformers image processor that brings every image to one size.
        crop_scale: smallest and largest share of the image's area in a random crop; (1, 1) crops nothing, the whole
            image is resized to the output size.
        crop_ratio: smallest and largest width-to-height ratio of a random crop.
        hflip: probability of a horizontal flip.
        color_jitter: strength for brightness, contrast and saturation (one number, three, or four with hue).
        auto_augment: timm's policy string, `rand-m9-mstd0.5-inc1` say. timm then leaves `color_jitter` out, except
            beside its `3a` policies.
        random_erasing: probability of erasing one rectangle after normalisation.
        erasing_mode: what goes there: `pixel` (noise), `rand` (one random colour) or `const` (zero).

    Returns:
        `(train_transform, eval_transform)`, each a `BatchTransform`. The second is the image processor itself.

    Raises:
        ValueError: a setting out of its range, an unknown policy, or an image processor that leaves images of
            different shape at different sizes.
    """
    _check_range("crop_scale", crop_scale, 0, 1)
    _check_range("crop_ratio", crop_ratio, 0, float("inf"))
    _check_probability("hflip", hflip)
    _check_probability("random_erasing", random_erasing)
    if erasing_mode not in ("pixel", "rand", "const"):
        raise ValueError(f"erasing_mode must be 'pixel', 'rand' or 'const', got {erasing_mode!r}.")
    _check_color_jitter(color_jitter)
    # timm passes over what it cannot read.
    if unread := [part for part in (auto_augment or "").split("-")[1:] if not re.match(r"[a-z]+\d", part)]:
        raise ValueError(
            f"auto_augment must be a policy of timm such as 'rand-m9-mstd0.5-inc1', got {auto_augment!r}: "
            f"{', '.join(map(repr, unread))} must be a name and a number, such as 'm9'."
        )
    if color_jitter and auto_augment and "3a" not in auto_augment:
        logger.warning("color_jitter=%s is left out: auto_augment=%r takes its place.", color_jitter, auto_augment)

    evaluate = ImageProcessorTransform(image_processor)
    size, mean, std = infer_image_processor_config(image_processor)
    interpolation = _interpolation(image_processor)
    try:
        crop, policy, finish = create_transform(
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
    # timm checks its policy strings by assertions and look-ups.
    except (AssertionError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        if auto_augment is None:
            raise
        raise ValueError(
            f"auto_augment must be a policy of timm such as 'rand-m9-mstd0.5-inc1', 'augmix-m5-w4-d2', 'original' or "
            f"'3a', got {auto_augment!r} ({type(error).__name__}: {error})."
        ) from error
    if crop_scale[0] == crop_scale[1] == 1:
        # timm's crop of scale 1 would still cut images whose shape lies outside crop_ratio.
        crop.transforms[0] = Resize(size, interpolation=InterpolationMode(interpolation), antialias=True)
    augment = Compose(crop.transforms + policy.transforms)
    clamp_posterize_bits(augment)
    # The first step of the last part, to a tensor in [0, 1], is one division for the whole batch.
    _, normalize, *erase = finish.transforms
    # Of all that timm may put here, only the policies draw from numpy.
    train = TrainTransform(augment, normalize, erase[0] if erase else None, auto_augment is not None)
    return train, evaluate


def infer_image_processor_config(
    image_processor: Any,
) -> tuple[tuple[int, int], tuple[float, float, float], tuple[float, float, float]]:
    """Output size (height, width), mean and standard deviation of an image processor, for pixels in [0, 1].

    Found by processing a black and a white image rather than by reading attributes, whose names and meaning differ
    between processors (`size` and `crop_size`, `do_rescale`, `crop_pct`).

    Raises:
        ValueError: images of different shape come out at different sizes, or not as (3, H, W).
    """
    transform = ImageProcessorTransform(image_processor)
    black = transform(Image.new("RGB", (96, 64), "black"))
    white = transform(Image.new("RGB", (64, 96), "white"))
    if black.shape != white.shape or black.ndim != 3 or black.shape[0] != 3:
        raise ValueError(
            "The image processor must bring every image to one size (3, H, W); a wide and a tall image became "
            f"{tuple(black.shape)} and {tuple(white.shape)}. Give it do_resize=True and a size of height and width, "
            "or a shortest_edge together with a centre crop."
        )
    height, width = black.shape[-2:]
    # The middle: a processor that pads does so at the border.
    offset = black[:, height // 2, width // 2].double()
    slope = white[:, height // 2, width // 2].double() - offset
    if not (slope > 0).all():
        raise ValueError(
            f"The image processor maps black to {offset.tolist()} and white no higher ({slope.tolist()})."
        )
    return (height, width), tuple((-offset / slope).tolist()), tuple((1 / slope).tolist())


def resize_image_processor(image_processor: Any, height: int, width: int) -> None:
    """Let an image processor make images of another size, in place.

    A shortest edge before a center crop grows or shrinks with the crop, so that the same fraction is cut off.

    Raises:
        ValueError: it cannot be set to this size.
    """
    (old_height, old_width), *_ = infer_image_processor_config(image_processor)
    if (old_height, old_width) == (height, width):
        return
    wanted, stored = {"height": height, "width": width}, image_processor.to_dict()
    changes = {"size": wanted}
    if stored.get("do_center_crop") and stored.get("crop_size"):
        ratio = max(height / old_height, width / old_width)
        resized = {edge: max(1, round(pixels * ratio)) for edge, pixels in dict(stored["size"]).items() if pixels}
        changes = {"size": resized, "crop_size": wanted}
    elif "shortest_edge" in dict(stored.get("size") or {}) and height == width:
        changes = {"size": {"shortest_edge": height}}
    for name, value in changes.items():
        current = getattr(image_processor, name)
        # Some versions of transformers store a size as a class of their own.
        setattr(image_processor, name, value if isinstance(current, dict) else type(current)(**value))
    try:
        found = "{}x{}".format(*infer_image_processor_config(image_processor)[0])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        found = f"none ({error})"
    if found != f"{height}x{width}":
        raise ValueError(
            f"The {type(image_processor).__name__} cannot be set to {height}x{width} pixels; the size it then makes "
            f"is {found}. Give it this size in its preprocessor_config.json, or name another image processor."
        )


def clamp_posterize_bits(transform: Compose) -> None:
    """Let timm's posterize operations keep at least one bit per channel, in place.

    At a magnitude of 10 (2.3% of the draws of `m9-mstd0.5`, one image in 660 altogether) timm asks for 0 bits. Up to
    version 12, Pillow made the image black; from 13 on it raises an error in the middle of a training. Nothing else
    about the policy changes, whereas the remedy through its string, `-mmax9`, cuts half of all magnitudes down to 9.
    """
    for op in _augment_ops(getattr(transform, "transforms", [])):
        if op.aug_fn is posterize:
            op.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    return posterize(image, max(1, bits_to_keep), **kwargs)


def _augment_ops(node: Any) -> list[AugmentOp]:
    """The operations of RandAugment and AugMix (`ops`) and of AutoAugment (`policy`, a list of lists)."""
    if isinstance(node, AugmentOp):
        return [node]
    if isinstance(node, list | tuple):
        return [op for item in node for op in _augment_ops(item)]
    inner = getattr(node, "ops", None) or getattr(node, "policy", None)
    return _augment_ops(list(inner)) if isinstance(inner, list | tuple | np.ndarray) else []


def _interpolation(image_processor: Any) -> str:
    resample = getattr(image_processor, "resample", None)
    if resample is None:
        return "bilinear"
    if isinstance(resample, InterpolationMode):
        return resample.value
    return Image.Resampling(int(resample)).name.lower()


def _check_range(name: str, value: Sequence[float], low: float, high: float) -> None:
    if len(value) != 2 or not (low < value[0] <= value[1] <= high and math.isfinite(value[1])):
        limit = f"at most {high}" if math.isfinite(high) else "finite"
        raise ValueError(f"{name} must be two numbers a <= b, above {low} and {limit}, got {tuple(value)}.")


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a probability between 0 and 1, got {value}.")


def _check_color_jitter(value: float | Sequence[float] | None) -> None:
    strengths = () if value is None else tuple(value) if isinstance(value, Sequence) else (value,)
    if isinstance(value, Sequence) and len(strengths) not in (3, 4) or any(not v >= 0 for v in strengths):
        raise ValueError(f"color_jitter must be one, three or four numbers of at least 0, got {value}.")
    if len(strengths) == 4 and strengths[3] > 0.5:
        raise ValueError(f"color_jitter's fourth number, the hue, must be at most 0.5, got {strengths[3]}.")
