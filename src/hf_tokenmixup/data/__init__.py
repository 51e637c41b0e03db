"""Image datasets: loading, columns, transforms, batches, label mapping and mixup."""

from ..utils.class_names import has_class_names
from .dataset import ImageClassificationData, collate
from .device_transform import DeviceTransform
from .digits import load_digits_dataset
from .iterable_dataset import ImageClassificationIterableDataset
from .label_mapping import LABEL_MAPPINGS, build_label_mapping
from .loading import ImageDatasetSplits, load_image_dataset
from .mixup import InputMixup
from .streaming import StreamingImageDatasetSplits, load_streaming_image_dataset
from .transforms import BatchTransform, build_transforms

__all__ = [
    "LABEL_MAPPINGS",
    "BatchTransform",
    "DeviceTransform",
    "ImageClassificationData",
    "ImageDatasetSplits",
    "InputMixup",
    "StreamingImageDatasetSplits",
    "ImageClassificationIterableDataset",
    "build_transforms",
    "collate",
    "has_class_names",
    "load_digits_dataset",
    "load_image_dataset",
    "load_streaming_image_dataset",
    "build_label_mapping",
]
