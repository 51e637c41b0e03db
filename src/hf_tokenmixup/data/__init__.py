"""Data: loading and columns, transforms, batches, mixing of input images, the embedded digits."""

from .dataset import ImageClassificationData, collate
from .digits import load_digits_dataset
from .loading import ImageData, load_image_dataset
from .mixing import InputMixing
from .transforms import BatchTransform, build_transforms

__all__ = [
    "BatchTransform",
    "ImageClassificationData",
    "ImageData",
    "InputMixing",
    "build_transforms",
    "collate",
    "load_digits_dataset",
    "load_image_dataset",
]
