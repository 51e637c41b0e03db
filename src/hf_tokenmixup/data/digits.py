"""The embedded data set: scikit-learn's handwritten digits, as a `datasets.DatasetDict` that needs no download.

1,797 grey images of 8x8 pixels from the test set of the UCI "Optical Recognition of Handwritten Digits" data, which
scikit-learn ships inside its package. The package's quickstart trains on them.
"""

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TEST_IMAGES = 360
SPLIT_SEED = 0
GREY_LEVELS = 16


def load_digits_dataset() -> DatasetDict:
    """Handwritten digits with a fixed, stratified split; nothing is downloaded or written to disk.

    Returns:
        Splits `train` (1,437 images) and `test` (360 images), columns `image` (8x8, grey, 0 to 255) and `label`
        (class names "0" to "9").
    """
    digits = load_digits()
    levels = np.rint(digits.images * (255 / GREY_LEVELS)).astype(np.uint8)
    train, test = train_test_split(
        np.arange(len(levels)), test_size=TEST_IMAGES, stratify=digits.target, random_state=SPLIT_SEED
    )
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})

    def build(indices: np.ndarray) -> Dataset:
        images = [PILImage.fromarray(levels[i]) for i in indices]
        return Dataset.from_dict({"image": images, "label": digits.target[indices].tolist()}, features=features)

    return DatasetDict({"train": build(train), "test": build(test)})
