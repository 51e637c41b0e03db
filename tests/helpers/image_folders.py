"""Image folders for tests."""

import os

from PIL import Image


def write_images(root, *folders, count=2, first=0):
    """Write images of one color each to folders below `root`, and return `root`."""
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(first, first + count):
            Image.new("RGB", (4, 4), (index, 0, 0)).save(root / folder / f"{index}.png")
    return root


def list_examples(data, split="train"):
    """Return path (relative to the folder of the split) and class name of each image."""
    dataset = getattr(data, split)
    paths = [value["path"] for value in dataset.with_format("arrow")[:]["image"].to_pylist()]
    common = os.path.commonpath(paths)
    return [
        (os.path.relpath(path, common), data.label_names[label])
        for path, label in zip(paths, dataset[data.label_column], strict=True)
    ]
