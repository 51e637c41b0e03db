"""The comparison with timm's loader reads the same images and gives the same batch."""

import dataclasses
import io
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import ViTImageProcessor

from hf_tokenmixup.benchmarks import input_pipeline
from hf_tokenmixup.benchmarks.input_pipeline import compare_with_timm
from hf_tokenmixup.cli.arguments import AugmentationArguments
from hf_tokenmixup.data import ImageClassificationData, build_transforms

PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=(0.4, 0.5, 0.6), image_std=(0.2,) * 3)


def encode(index):
    noise = np.random.default_rng(index).integers(256, size=(40, 50, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG")
    return {"bytes": stream.getvalue(), "path": None}


def build(augmentation, **settings):
    dataset = Dataset.from_dict({"image": [encode(index) for index in range(6)], "label": [0, 1, 2, 3, 4, 0]})
    transform, _ = build_transforms(PROCESSOR, **augmentation, normalize_on_device=True)
    return ImageClassificationData(dataset, transform, **settings)


@pytest.mark.parametrize("changes", [{}, {"random_erasing": 1.0, "erasing_mode": "const"}])
def test_compare_with_timm_times_equal_batches(monkeypatch, changes):
    # A crop of the complete image has no randomness.
    settings = {"crop_scale": [1.0, 1.0], "crop_ratio": [1.25, 1.25], "hflip": 0.0} | changes
    augmentation = dataclasses.asdict(AugmentationArguments(**settings))
    batches = {}

    def run(functions, **kwargs):
        for name, function in functions.items():
            random.seed(0)
            batches[name] = function()
        return {}

    monkeypatch.setattr(input_pipeline, "time_interleaved", run)
    data = build(augmentation)
    compare_with_timm(data, augmentation, 4)
    ours, (pixels, labels) = batches["ours"], batches["timm"]
    assert torch.equal(ours["labels"], labels)
    expected = torch.float32 if changes else torch.uint8
    assert ours["pixel_values"].dtype == expected
    if not changes:
        # timm crops with its own rounding of the sides, and resizes the crop.
        assert (ours["pixel_values"].float() - pixels.float()).abs().mean() < 20
    assert ours["pixel_values"].shape == pixels.shape


def test_compare_with_timm_reports_time_per_batch():
    augmentation = dataclasses.asdict(AugmentationArguments())
    timings = compare_with_timm(build(augmentation), augmentation, 2, rounds=2)
    assert list(timings) == ["ours", "timm"] and timings["timm"].ratio is None
    assert timings["ours"].ratio.median > 0


def test_compare_with_timm_cached_images_raise():
    augmentation = dataclasses.asdict(AugmentationArguments())
    with pytest.raises(ValueError, match="`image_cache_gib` to 0"):
        compare_with_timm(build(augmentation, cache_gib=1.0), augmentation, 2)
