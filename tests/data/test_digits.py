"""Handwritten digits: sizes, values and split."""

import numpy as np
from datasets import ClassLabel, Image
from sklearn.datasets import load_digits

from hf_tokenmixup.data import load_digits_dataset


def test_digits_split_is_fixed_and_stratified(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, again = load_digits_dataset(), load_digits_dataset()
    assert {split: len(data[split]) for split in data} == {"train": 1437, "test": 360}
    assert data["test"]["label"][:] == again["test"]["label"][:]
    counts = np.bincount(data["test"]["label"][:], minlength=10)
    assert counts.min() >= 35 and counts.max() <= 37
    # Together the two splits hold every original image exactly once.
    scaled = {"train": [], "test": []}
    for split, images in scaled.items():
        images.extend(np.asarray(image).tobytes() for image in data[split]["image"][:])
    expected = [np.rint(image * 255 / 16).astype(np.uint8).tobytes() for image in load_digits().images]
    assert sorted(scaled["train"] + scaled["test"]) == sorted(expected)
    assert list(tmp_path.iterdir()) == []


def test_digits_images_match_labels():
    data = load_digits_dataset()
    assert data["train"].features["image"] == Image()
    assert data["train"].features["label"] == ClassLabel(names=[str(i) for i in range(10)])
    source = zip(*load_digits(return_X_y=True), strict=True)
    original = {np.rint(x * 255 / 16).astype(np.uint8).tobytes(): y for x, y in source}
    for split in data.values():
        for example in split.select(range(50)):
            image = np.asarray(example["image"])
            assert image.shape == (8, 8) and image.max() > 200
            assert original[image.tobytes()] == example["label"]
