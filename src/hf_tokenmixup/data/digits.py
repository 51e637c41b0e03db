"""Handwritten digits of scikit-learn as a `datasets.DatasetDict` that needs no download.

The dataset has 1,797 grayscale images of 8x8 pixels: the test set of "Optical Recognition of Handwritten Digits" of
UCI, which is part of scikit-learn. The quickstart uses it.
"""

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NUM_TEST_IMAGES = 360
SPLIT_SEED = 0
MAX_GRAY_LEVEL = 16


def load_digits_dataset() -> DatasetDict:
    """Load the handwritten digits with a fixed, stratified split. Nothing is downloaded or written to disk.

    Returns:
        The splits `train` (1,437 images) and `test` (360 images) with the columns `image` (8x8 grayscale, 0 to 255)
        and `label` (class names "0" to "9").
    """
    digits = load_digits()
    levels = np.rint(digits.images * (255 / MAX_GRAY_LEVEL)).astype(np.uint8)
    train, test = train_test_split(
        np.arange(len(levels)), test_size=NUM_TEST_IMAGES, stratify=digits.target, random_state=SPLIT_SEED
    )
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})

    def build(indices: np.ndarray) -> Dataset:
        images = [PILImage.fromarray(levels[i]) for i in indices]
        return Dataset.from_dict({"image": images, "label": digits.target[indices].tolist()}, features=features)

    return DatasetDict({"train": build(train), "test": build(test)})
