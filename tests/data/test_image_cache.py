"""Reading of large images at reduced size."""

import io
import math

import numpy as np
import pytest
from datasets import Dataset
from PIL import ExifTags, Image
from transformers import ViTImageProcessor

from hf_tokenmixup.data import ImageClassificationData, ImageClassificationIterableDataset, build_transforms
from hf_tokenmixup.data.image_cache import read_rgb


def encode(width, height, image_format="JPEG", **options):
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    image = Image.fromarray(np.tile(ramp, (height, 1))).convert("RGB")
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return {"bytes": stream.getvalue(), "path": None}


@pytest.mark.parametrize(
    "size, min_side, expected",
    [
        ((400, 300), None, (400, 300)),
        ((400, 300), 301, (400, 300)),
        ((400, 300), 151, (400, 300)),
        ((400, 300), 150, (200, 150)),
        ((400, 300), 75, (100, 75)),
        ((300, 400), 10, (38, 50)),
    ],
)
def test_read_rgb_min_side_is_lower_bound(size, min_side, expected):
    value = encode(*size, quality=95)
    image = read_rgb(value, min_side=min_side)
    assert image.size == expected and image.mode == "RGB"
    resized = read_rgb(value).resize(expected, Image.Resampling.BOX)
    assert np.abs(np.asarray(image, float) - np.asarray(resized, float)).mean() < 2


def test_read_rgb_min_side_changes_no_other_format():
    assert read_rgb(encode(400, 300, "PNG"), min_side=10).size == (400, 300)


def test_read_rgb_min_side_applies_orientation():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = read_rgb(encode(400, 300, exif=exif, quality=95), min_side=100)
    # Rotated by 90 degrees: the ramp is vertical.
    assert image.size == (150, 200)
    assert np.asarray(image)[-1].mean() - np.asarray(image)[0].mean() > 200


def test_train_transform_min_side_needs_no_enlarged_crop():
    transform, evaluate = build_transforms(
        ViTImageProcessor(size={"height": 32, "width": 32}), crop_scale=(0.25, 1.0), crop_ratio=(0.8, 1.5)
    )
    side = transform.min_side
    shortest = math.sqrt(0.25 * side**2 / 1.5)
    assert 32 <= shortest < 32 * (1 + 1 / side)
    assert not hasattr(evaluate, "min_side"), "evaluation reads the image at full size"


@pytest.mark.parametrize("streamed", [False, True])
def test_datasets_read_images_at_size_of_transform(streamed):
    sizes = []

    def transform(image):
        sizes.append(image.size)
        return np.zeros((3, 1, 1))

    transform.min_side = 150
    data = Dataset.from_dict({"image": [encode(400, 300)] * 2, "label": [0, 1]})
    if streamed:
        list(ImageClassificationIterableDataset(data.to_iterable_dataset(), transform))
    else:
        ImageClassificationData(data, transform)[1]
    assert set(sizes) == {(200, 150)}
