"""Select the images of some classes of a dataset."""

from collections.abc import Mapping, Sequence

import numpy as np
from datasets import Dataset

from ..utils.text import did_you_mean, format_list
from .columns import read_labels, replace_label_column

MAX_NAMES_SHOWN = 20


def select_classes(
    splits: Mapping[str, Dataset], column: str, names: Sequence[str], classes: Sequence[str]
) -> tuple[dict[str, Dataset], list[str]]:
    """Select the images of some classes, and number these classes from 0 in the order of the dataset.

    Args:
        splits: splits by name, with labels encoded by `hf_tokenmixup.data.columns.encode_labels`.
        column: label column.
        names: class names of the splits in order.
        classes: names of the classes to keep, in any order.

    Returns:
        The splits without the other images, and the names of the kept classes in order.

    Raises:
        ValueError: there is no name, or one is repeated or is not a class of the dataset, or a split has no image of
            these classes.
    """
    wanted = set(classes)
    if not wanted:
        raise ValueError("`classes` must name at least one class of the dataset, got none.")
    if len(wanted) < len(classes):
        repeated = sorted({name for name in classes if classes.count(name) > 1})
        raise ValueError(f"`classes` must be different names, got {format_list(repeated)} more than once.")
    if unknown := [name for name in classes if name not in names]:
        known = f"Its {len(names)} classes are {format_list(names, MAX_NAMES_SHOWN)}."
        raise ValueError(
            f"`classes` has {unknown[0]!r}, which the dataset does not have"
            f"{did_you_mean(unknown[0], names, repr)} {known}"
        )
    kept = [name for name in names if name in wanted]
    ids = [index for index, name in enumerate(names) if name in wanted]
    selected = {}
    for split, dataset in splits.items():
        labels = read_labels(dataset, column).to_numpy()
        rows = np.flatnonzero(np.isin(labels, ids))
        if not len(rows):
            raise ValueError(
                f"Split '{split}' has no image of the classes {format_list(kept)}. Choose other `classes` or another "
                "split."
            )
        # Afterwards, the dataset with an index would be copied.
        renumbered = replace_label_column(dataset, column, names, labels, kept)
        selected[split] = renumbered.select(rows, keep_in_memory=True)
    return selected, kept
