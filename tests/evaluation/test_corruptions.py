"""Corruptions: effect and order of the severities, and random numbers that depend on the image alone."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from hf_tokenmixup.data import ImageClassificationData, load_digits_dataset
from hf_tokenmixup.data.transforms import ImageProcessorTransform
from hf_tokenmixup.evaluation.corruptions import (
    CORRUPTIONS,
    CorruptedTransform,
    CorruptionResult,
    average_corruptions,
    validate_corruptions,
    with_transform,
)

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def processor(size):
    return ViTImageProcessor(size={"height": size, "width": size}, image_mean=MEAN, image_std=STD)


def images(size, count=3):
    """Smooth images with some texture."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(40, 200, (count, 8, 8, 3), dtype=np.uint8)
    smooth = [Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC) for pixels in coarse]
    texture = generator.integers(-15, 16, (count, size, size, 3))
    return [
        Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
        for image, noise in zip(smooth, texture, strict=True)
    ]


def to_rgb(batch):
    return batch * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def distances(name, size):
    clean = to_rgb(ImageProcessorTransform(processor(size)).batch(images(size)))
    corrupted = (to_rgb(CorruptedTransform(processor(size), name, n).batch(images(size))) for n in range(1, 6))
    return [(rgb - clean).pow(2).mean().sqrt().item() for rgb in corrupted]


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_changes_images_more_with_each_severity(name, size):
    found = distances(name, size)
    assert found[0] > 0.003 and found[4] > 1.2 * found[0], found
    # Sizes that do not divide each other also shift the pixels.
    assert name == "pixelate" or found == sorted(found), found


def test_corruption_of_large_images_is_stronger():
    assert all(distances(name, 96)[2] > distances(name, 32)[2] for name in ("gaussian_noise", "contrast"))


def test_gaussian_noise_has_the_standard_deviation_of_its_severity():
    gray = Image.new("RGB", (32, 32), (128, 128, 128))
    noise = to_rgb(CorruptedTransform(processor(32), "gaussian_noise", 5)(gray)) - 128 / 255
    assert noise.std().item() == pytest.approx(0.1, rel=0.05) and abs(noise.mean().item()) < 0.01


def test_brightness_and_contrast_have_the_values_of_their_factors():
    gray = Image.new("RGB", (32, 32), (100, 100, 100))
    bright = to_rgb(CorruptedTransform(processor(32), "brightness", 3)(gray))
    assert torch.allclose(bright, torch.full_like(bright, 130 / 255), atol=1.5 / 255)
    half = np.zeros((32, 32, 3), dtype=np.uint8)
    half[:16] = 200
    contrast = to_rgb(CorruptedTransform(processor(32), "contrast", 2)(Image.fromarray(half)))
    assert contrast[:, :16].mean().item() == pytest.approx(150 / 255, abs=0.01)
    assert contrast[:, 16:].mean().item() == pytest.approx(50 / 255, abs=0.01)


@pytest.fixture(scope="module")
def split():
    return load_digits_dataset()["test"].select(range(12))


def read(split, transform, batch_size=1, workers=0):
    data = with_transform(ImageClassificationData(split, ImageProcessorTransform(processor(16))), transform)
    loader = torch.utils.data.DataLoader(data, batch_size=batch_size, num_workers=workers)
    return torch.cat([batch["pixel_values"] for batch in loader])


def test_corruption_does_not_depend_on_batch_size_workers_or_generators(split):
    transform = CorruptedTransform(processor(16), "gaussian_noise", seed=7)
    expected = read(split, transform)
    torch.manual_seed(123)
    assert torch.equal(read(split, transform, batch_size=5), expected)
    assert torch.equal(read(split, transform, batch_size=4, workers=1), expected)
    state = torch.get_rng_state()
    reversed_images = [split[index]["image"].convert("RGB") for index in (3, 1)]
    assert torch.equal(transform.batch(reversed_images), expected[[3, 1]])
    assert torch.equal(torch.get_rng_state(), state)


def test_corruption_draws_other_noise_for_other_images_and_seeds(split):
    first, second = (split[index]["image"].convert("RGB") for index in (0, 1))
    plain = ImageProcessorTransform(processor(16))
    noise = [
        CorruptedTransform(processor(16), "gaussian_noise", seed=seed)(image) - plain(image)
        for image, seed in ((first, 1), (first, 2), (second, 1))
    ]
    assert not torch.allclose(noise[0], noise[1], atol=0.1) and not torch.allclose(noise[0], noise[2], atol=0.1)


def test_with_transform_leaves_the_split_unchanged(split):
    data = ImageClassificationData(split, ImageProcessorTransform(processor(16)))
    before = data[0]["pixel_values"]
    corrupted = with_transform(data, CorruptedTransform(processor(16), "contrast"))
    assert torch.equal(data[0]["pixel_values"], before) and not torch.equal(corrupted[0]["pixel_values"], before)
    assert corrupted[0]["labels"] == data[0]["labels"]


def test_average_corruptions_returns_means():
    results = [CorruptionResult("jpeg", 3, 0.5, 1.0, 0.1), CorruptionResult("contrast", 3, 0.7, 2.0, 0.3)]
    mean = average_corruptions(results)
    assert (mean.name, mean.severity) == ("mean", 3)
    assert (mean.top1, mean.loss, mean.calibration_error) == pytest.approx((0.6, 1.5, 0.2))


@pytest.mark.parametrize(
    "names, severity, message",
    [
        (["jpeg", "fog"], 3, "There is no corruption 'fog'. Corruptions: gaussian_noise, gaussian_blur, jpeg"),
        (["jpeg", "jpeg"], 3, "must be different, got jpeg jpeg"),
        (["jpeg"], 0, "between 1 and 5, got 0"),
        (["jpeg"], 6, "between 1 and 5, got 6"),
    ],
)
def test_validate_corruptions_with_wrong_value_raises(names, severity, message):
    with pytest.raises(ValueError, match=message):
        validate_corruptions(names, severity)
