"""Map-style dataset: decoding, reproducible augmentation, workers and batches."""

import io
import pickle
import random

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor
from transformers import ViTImageProcessor

from hf_tokenmixup.data import (
    ImageClassificationData,
    build_transforms,
    collate,
    load_digits_dataset,
    load_image_dataset,
)
from hf_tokenmixup.data.image_cache import ImageReader, convert_to_rgb

PROCESSOR = ViTImageProcessor(size={"height": 16, "width": 16})


def rows(images, labels=None, feature=None):
    """A data set of stored images as they are: {"bytes", "path"} dictionaries, paths or PIL images."""
    labels = labels or [0] * len(images)
    feature = feature or Image()
    features = Features({"image": feature, "label": ClassLabel(names=["a", "b"])})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def digits(seed=0, auto_augment="rand-m9-mstd0.5-inc1", count=12):
    train, _ = build_transforms(PROCESSOR, auto_augment=auto_augment, random_erasing=0.5)
    return ImageClassificationData(load_digits_dataset()["train"].select(range(count)), train, seed=seed)


def pixels(data):
    return torch.stack([data[i]["pixel_values"] for i in range(len(data))])


def test_getitem_returns_transformed_image_and_label():
    images = [PILImage.new("RGB", (4, 4), (10, 20, 30)), PILImage.new("RGB", (4, 4), (40, 50, 60))]
    data = ImageClassificationData(rows(images, [1, 0]), pil_to_tensor)
    assert len(data) == 2 and data[0]["labels"] == 1 and data[1]["labels"] == 0
    assert data[0]["pixel_values"][:, 0, 0].tolist() == [10, 20, 30]
    assert data[-1]["pixel_values"][:, 3, 3].tolist() == [40, 50, 60]


def test_augmentation_depends_on_seed_epoch_and_index():
    data, again = digits(), digits()
    first = pixels(data)
    random.seed(99), torch.manual_seed(99), np.random.seed(99)  # noqa: NPY002
    assert torch.equal(torch.stack([again[i]["pixel_values"] for i in reversed(range(12))]).flip(0), first)
    data.set_epoch(1)
    second = pixels(data)
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    data.set_epoch(0)
    assert torch.equal(pixels(data), first)
    assert not torch.equal(pixels(digits(seed=1)), first)
    # Equal images at two places are augmented differently.
    twice = load_digits_dataset()["train"].select([0, 0])
    same = ImageClassificationData(twice, data.transform, seed=0)
    assert not torch.equal(same[0]["pixel_values"], same[1]["pixel_values"])


@pytest.mark.parametrize("auto_augment", ["rand-m9-mstd0.5-inc1", None])
def test_getitem_restores_global_rng(auto_augment):
    data = digits(auto_augment=auto_augment)
    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    # A cached normal draw is part of the state of both.
    random.gauss(0, 1), np.random.randn()  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    pixels(data)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    assert torch.equal(before[0], after[0]) and before[1] == after[1]
    assert np.array_equal(before[2][1], after[2][1]) and before[2][2:] == after[2][2:]


def test_getitem_error_restores_global_rng():
    def fail(image):
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        raise RuntimeError("transform")

    data = ImageClassificationData(rows([PILImage.new("RGB", (4, 4))]), fail, seed=0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    with pytest.raises(RuntimeError):
        data[0]
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # noqa: NPY002
    assert torch.equal(before[0], after[0]) and before[1] == after[1] and np.array_equal(before[2], after[2])


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_set_epoch_reaches_persistent_workers(context):
    data, expected = digits(), digits()
    loader = DataLoader(data, 5, num_workers=2, collate_fn=collate, persistent_workers=True,
                        multiprocessing_context=context)  # fmt: skip
    for epoch in (0, 1, 7):
        data.set_epoch(epoch)
        expected.set_epoch(epoch)
        assert torch.equal(torch.cat([batch["pixel_values"] for batch in loader]), pixels(expected))


def test_augmentation_does_not_depend_on_batch():
    data = digits()
    alone = pixels(data)
    for order in ([3, 1], [1, 3, 11, 0], list(range(12))):
        together = torch.stack([example["pixel_values"] for example in data.__getitems__(order)])
        assert torch.equal(together, alone[order])
        assert [example["labels"] for example in data.__getitems__(order)] == [data[i]["labels"] for i in order]


def test_cached_images_match_decoded_images():
    sizes = ((4, 6), (9, 2), (4, 6), (1, 1))
    generator = np.random.default_rng(0)
    images = [PILImage.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    images.append(images[0].convert("L"))
    needed = sum(3 * image.width * image.height for image in images) / 2**30
    plain = ImageClassificationData(rows(images), pil_to_tensor)
    kept = ImageClassificationData(rows(images), pil_to_tensor, cache_gib=needed)
    assert kept.images.cached and not plain.images.cached
    for index in range(-5, 5):
        assert torch.equal(kept[index]["pixel_values"], plain[index]["pixel_values"])
    copy = pickle.loads(pickle.dumps(kept))
    assert torch.equal(copy[1]["pixel_values"], plain[1]["pixel_values"])
    assert not ImageClassificationData(rows(images), pil_to_tensor, cache_gib=0.99 * needed).images.cached
    with pytest.raises(IndexError):
        kept[5]


def test_cache_size_is_estimated_from_sample(monkeypatch):
    images = [PILImage.new("RGB", (4, 4))] * 100
    data = ImageClassificationData(rows(images), pil_to_tensor, cache_gib=100 * 48 / 2**30)
    assert data.images.cached
    read = []
    monkeypatch.setattr(ImageReader, "read", lambda self, at: read.extend(at) or [images[0]] * len(at))
    assert not ImageClassificationData(rows(images), pil_to_tensor, cache_gib=99 * 48 / 2**30).images.cached
    assert len(read) == 32 and (read[0], read[-1]) == (0, 99)


def test_cache_invalid_image_raises():
    good = encoded(PILImage.new("RGB", (4, 4)))
    images = [{"bytes": good, "path": None}] * 40
    images[13] = {"bytes": good[:20], "path": "cut.png"}
    ImageClassificationData(rows(images), pil_to_tensor)
    with pytest.raises(ValueError, match="Image 13 of split 'train' .cut.png"):
        ImageClassificationData(rows(images), pil_to_tensor, cache_gib=1.0)


@pytest.mark.parametrize("workers, cache", [(0, 0.0), (2, 0.0), (0, 1.0)])
def test_invalid_images_are_counted_and_listed(workers, cache):
    good = encoded(PILImage.new("RGB", (64, 64)), "BMP")
    images = [{"bytes": good, "path": None}] * 300
    for index in (13, 200, 299):
        images[index] = {"bytes": good[:2000], "path": f"{index}.bmp" if index < 299 else None}
    listed = "Of all 300 images of the split, 3 cannot be decoded: 13 .13.bmp., 200 .200.bmp., 299"
    with pytest.raises(ValueError, match=listed) as error:
        data = ImageClassificationData(rows(images), pil_to_tensor, cache_gib=cache)
        for _ in DataLoader(data, 20, num_workers=workers, collate_fn=collate):
            pass
    assert "Image 299 of split 'train'" in str(error.value) or "Image 13 of split 'train'" in str(error.value)


def test_invalid_images_check_is_limited(monkeypatch):
    images = [{"bytes": b"", "path": None}] * 600
    data = ImageClassificationData(rows(images), pil_to_tensor)
    with pytest.raises(
        ValueError, match=r"Of all 600 .* 600 cannot be decoded: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 590 more"
    ):
        data[5]
    clock = iter([0, 1, 61])
    monkeypatch.setattr("hf_tokenmixup.data.image_cache.time.monotonic", lambda: next(clock))
    with pytest.raises(
        ValueError, match=r"Image 5 .* Of the first 256 of 600 \(60 s\) images .* 256 cannot be decoded"
    ):
        data[5]


def test_pickled_dataset_returns_same_images():
    data = digits()
    data.set_epoch(4)
    copy = pickle.loads(pickle.dumps(data))
    assert copy.epoch == 4 and torch.equal(pixels(copy), pixels(data))


def test_pickled_image_folder_has_no_paths(tmp_path):
    sizes = []
    for count in (50, 250):
        folder = tmp_path / str(count)
        for index in range(count):
            file = folder / f"class {index % 2}" / f"{index:030}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(PILImage.new("L", (2, 2))))
        found = load_image_dataset(train_dir=str(folder), cache_dir=str(tmp_path / "cache"), do_eval=False)
        data = ImageClassificationData(found.train, pil_to_tensor, seed=0)
        assert len(data) == count
        sizes.append(len(pickle.dumps(data)))
    assert sizes[1] - sizes[0] <= 200 * data.labels.itemsize + 50


def test_images_of_all_modes_become_rgb():
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    colour = np.stack([grey, 255 - grey, grey // 2], -1)
    rgb = PILImage.fromarray(colour)
    rgba = rgb.copy()
    rgba.putalpha(0)
    palette = rgb.quantize(16)
    clear = rgb.quantize(16)
    cases = {
        "L": (encoded(PILImage.fromarray(grey)), np.stack([grey] * 3, -1)),
        "16-bit": (encoded(PILImage.fromarray(grey.astype(np.uint16) * 257)), np.stack([grey] * 3, -1)),
        "RGBA": (encoded(rgba), colour),
        "P": (encoded(palette), np.asarray(palette.convert("RGB"))),
        "P, transparent": (encoded(clear, transparency=bytes([0, 100])), np.asarray(clear.convert("RGB"))),
        "CMYK": (encoded(rgb.convert("CMYK"), "TIFF"), np.asarray(rgb.convert("CMYK").convert("RGB"))),
        "1": (encoded(PILImage.fromarray(grey > 100)), np.stack([(grey > 100) * 255] * 3, -1)),
    }
    data = ImageClassificationData(rows([{"bytes": b, "path": None} for b, _ in cases.values()]), pil_to_tensor)
    for index, (name, (_, expected)) in enumerate(cases.items()):
        out = data[index]["pixel_values"].permute(1, 2, 0).numpy()
        assert np.array_equal(out, expected), name


def test_transparent_palette_logs_no_warning(recwarn):
    image = PILImage.open(io.BytesIO(encoded(PILImage.new("P", (2, 2)), transparency=bytes([0, 9]))))
    assert convert_to_rgb(image).mode == "RGB" and not recwarn.list


def test_exif_orientation_is_applied():
    image = PILImage.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    data = ImageClassificationData(rows([{"bytes": encoded(image, "JPEG", exif=exif), "path": None}]), pil_to_tensor)
    assert data[0]["pixel_values"].shape == (3, 8, 4)


def test_unreadable_image_raises_with_name(tmp_path):
    good = encoded(PILImage.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)))
    broken = tmp_path / "broken.png"
    broken.write_bytes(good[: len(good) // 2])
    images = [
        {"bytes": good, "path": None},
        {"bytes": good[: len(good) // 2], "path": "truncated.png"},
        {"bytes": b"", "path": None},
        {"bytes": b"no image", "path": None},
        {"bytes": None, "path": str(tmp_path / "gone.png")},
        {"bytes": None, "path": str(broken)},
        None,
    ]
    data = ImageClassificationData(rows(images), pil_to_tensor, split="validation")
    assert data[0]["pixel_values"].shape == (3, 40, 40)
    for index, hint in enumerate(["truncated.png", "", "cannot identify", "gone.png", "broken.png", "None"], start=1):
        with pytest.raises(ValueError, match=f"Image {index} of split 'validation'") as error:
            data[index]
        assert hint in str(error.value) and "remove the row" in str(error.value)


def test_string_column_with_paths_is_read(tmp_path):
    PILImage.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "0.png")
    data = ImageClassificationData(rows([str(tmp_path / "0.png")], feature=Value("string")), pil_to_tensor)
    assert data[0]["pixel_values"][:, 0, 0].tolist() == [1, 2, 3]


def test_collate():
    examples = [{"pixel_values": torch.full((3, 2, 2), float(i)), "labels": i} for i in range(3)]
    batch = collate(examples)
    assert batch["pixel_values"].shape == (3, 3, 2, 2) and batch["pixel_values"][2].unique().item() == 2
    assert batch["labels"].dtype == torch.int64 and batch["labels"].tolist() == [0, 1, 2]
    examples.append({"pixel_values": torch.zeros(3, 2, 4), "labels": 0})
    with pytest.raises(ValueError, match=r"the same shape.*\(3, 2, 2\), \(3, 2, 4\)"):
        collate(examples)


def test_collate_without_labels():
    image = torch.zeros(3, 2, 2)
    for batch in ([{"pixel_values": image}] * 2, [{"pixel_values": image, "labels": None}] * 2):
        assert list(collate(batch)) == ["pixel_values"]


def test_collate_without_images_or_with_some_labels_raises():
    image = torch.zeros(3, 2, 2)
    with pytest.raises(ValueError, match="at least one example, got 0"):
        collate([])
    with pytest.raises(ValueError, match="got 1 labels for 2 images"):
        collate([{"pixel_values": image, "labels": 0}, {"pixel_values": image}])
