"""Data: loading and columns, transforms, batches, matching of classes, mixing of input images, the embedded digits."""

from ..utils.class_names import has_class_names
from .dataset import ImageClassificationData, collate
from .digits import load_digits_dataset
from .iterable_dataset import StreamedImages
from .label_mapping import LABEL_MAPPINGS, match_labels
from .loading import ImageData, load_image_dataset
from .mixup import InputMixing
from .streaming import StreamedImageData, load_image_stream
from .transforms import BatchTransform, build_transforms

__all__ = [
    "LABEL_MAPPINGS",
    "BatchTransform",
    "ImageClassificationData",
    "ImageData",
    "InputMixing",
    "StreamedImageData",
    "StreamedImages",
    "build_transforms",
    "collate",
    "has_class_names",
    "load_digits_dataset",
    "load_image_dataset",
    "load_image_stream",
    "match_labels",
]
