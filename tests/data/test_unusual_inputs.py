"""Unusual but valid inputs: image formats, batch sizes and dataset sizes."""

import math

import numpy as np
import pytest
from datasets import Value
from PIL import Image
from user_errors.harness import TOKENMIXUP, Harness, encode_image, solid_image

from hf_tokenmixup.data import ImageClassificationData, load_image_dataset

RED = (200, 100, 50)


def palette(transparency: int | None = None) -> bytes:
    image = solid_image("P", color=3)
    image.putpalette([0, 0, 0] * 3 + list(RED))
    if transparency is not None:
        image.info["transparency"] = transparency
    return encode_image(image)


def sixteen_bits() -> bytes:
    return encode_image(Image.fromarray(np.full((16, 16), 100 * 257, dtype=np.uint16)))


# Each with the colour that the model must see.
KINDS = {
    "RGB": (encode_image(solid_image(color=RED)), RED),
    "palette": (palette(), RED),
    "palette with transparency": (palette(3), RED),
    "alpha": (encode_image(solid_image("RGBA", color=(*RED, 7))), RED),
    "grey": (encode_image(solid_image("L", color=100)), (100, 100, 100)),
    "grey with alpha": (encode_image(solid_image("LA", color=(100, 7))), (100, 100, 100)),
    "16-bit grey": (sixteen_bits(), (100, 100, 100)),
    "one bit": (encode_image(solid_image("1", color=1)), (255, 255, 255)),
    "CMYK": (encode_image(solid_image("CMYK", color=(0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    "CMYK as JPEG": (encode_image(solid_image("CMYK", color=(0, 0, 0, 255)), "JPEG"), (0, 0, 0)),
    "one pixel": (encode_image(solid_image(size=(1, 1), color=RED)), RED),
    "one row": (encode_image(solid_image(size=(300, 1), color=RED)), RED),
}
EVERY_KIND = [content for content, _ in KINDS.values()]


@pytest.fixture
def harness(tmp_path, monkeypatch):
    return Harness(tmp_path, tmp_path, monkeypatch)


def folder_of(harness: Harness, images: list[bytes]):
    return harness.write_parquet(images, [index % 2 for index in range(len(images))], Value("int64"))


def train(harness: Harness, images: list[bytes], *arguments):
    """Train on all of them, and evaluate on all of them."""
    data = folder_of(harness, images)
    options = ["--dataset_name", data, "--eval_split", "train", "--do_eval", *harness.vit_flags(), *TOKENMIXUP]
    trainer = harness.train(*options, "--num_train_epochs", 1, "--logging_steps", 1, *arguments)
    steps = [record for record in trainer.state.log_history if "loss" in record]
    assert steps and all(math.isfinite(step["loss"]) for step in steps)
    assert trainer.state.log_history[-1]["eval_top5"] == 1.0  # of two classes
    return trainer, steps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache_gib", [0.0, 1.0])
def test_images_of_all_formats_are_read_with_correct_colors(harness, kind, cache_gib):
    content, color = KINDS[kind]
    data = load_image_dataset(
        str(folder_of(harness, [content] * 2)), cache_dir=harness.folder / "cache", do_eval=False
    )
    seen = ImageClassificationData(data.train, np.asarray, cache_gib=cache_gib)[1]["pixel_values"]
    assert seen.dtype == np.uint8 and (seen == color).all()


def test_images_of_all_formats_train(harness):
    _, steps = train(harness, EVERY_KIND)
    assert len(steps) == 1


def test_large_image_trains(harness):
    harness.monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.warns(Image.DecompressionBombWarning, match="256 pixels"):
        train(harness, [encode_image(solid_image(color=RED))] * 2)


def test_batch_size_one_mixes_no_tokens(harness):
    _, steps = train(harness, EVERY_KIND[:3], "--per_device_train_batch_size", 1, "--mixup_alpha", 0.8)
    assert len(steps) == 3
    assert [step["easy_samples"] for step in steps] == [1, 1, 1]
    assert [step["mixed_samples"] for step in steps] == [step["replaced_tokens"] for step in steps] == [0, 0, 0]


def test_batch_size_above_dataset_size_uses_dataset(harness):
    _, steps = train(harness, EVERY_KIND[:3], "--per_device_train_batch_size", 64, "--per_device_eval_batch_size", 64)
    assert [step["easy_samples"] for step in steps] == [3]


def test_last_batch_of_one_image(harness):
    options = ["--per_device_train_batch_size", 4, "--mixup_alpha", 0.8, "--cutmix_alpha", 1.0]
    _, steps = train(harness, EVERY_KIND[:5], *options)
    assert [step["easy_samples"] for step in steps] == [4, 1] and steps[1]["mixed_samples"] == 0


def test_max_train_samples_above_dataset_size_uses_dataset(harness):
    trainer, _ = train(harness, EVERY_KIND[:3], "--max_train_samples", 99, "--max_eval_samples", 99)
    assert len(trainer.train_dataset) == len(trainer.eval_dataset) == 3
