"""Detect image and label columns, and encode labels with the same class indices in all splits.

Datasets of the Hub have different column names (CIFAR-10: `img` and `label`, CIFAR-100: `img` and `fine_label`,
ImageNet: `image` and `label`) and store labels as ClassLabel, integers or strings.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Image, Value
from datasets.features.features import FeatureType

from ..utils.text import format_list

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")
MAX_NUM_CLASSES = 1_000_000


def describe_columns(dataset: Dataset) -> str:
    """Describe the columns of a dataset for messages: `'img' (Image), 'fine_label' (ClassLabel)`."""
    types = {
        name: feature.dtype if isinstance(feature, Value) else type(feature).__name__
        for name, feature in (dataset.features or {}).items()
    }
    return ", ".join(f"'{name}' ({type_name})" for name, type_name in types.items())


def find_image_column(dataset: Dataset, split: str, name: str | None = None) -> str:
    """Find the image column: `image` or `img`, otherwise the only image column.

    If there are several candidates, a warning names the selected column.

    Args:
        dataset: the split.
        split: name of the split, for messages.
        name: the column to use instead.

    Raises:
        ValueError: if there is no image column, or more than one candidate, or `name` is no image column.
    """
    features = dataset.features
    if name is not None:
        _validate_column_exists(dataset, split, name, "image_column_name")
        if not _can_hold_images(features[name]):
            raise ValueError(
                f"Column '{name}' of split '{split}' has no images. Expected a datasets.Image column, image bytes or "
                f"file paths. The columns are {describe_columns(dataset)}. Choose one with `image_column_name`."
            )
        return name
    images = [column for column, feature in features.items() if isinstance(feature, Image)]
    for column in IMAGE_COLUMNS:
        if column in images:
            _log_choice("Images", split, column, images, "image_column_name")
            return column
    if len(images) == 1:
        return images[0]
    raise ValueError(
        f"Expected one image column in split '{split}', found {len(images)}. The columns are "
        f"{describe_columns(dataset)}. Choose one with `image_column_name`."
    )


def find_label_column(dataset: Dataset, split: str, name: str | None = None) -> str:
    """Find the label column: `label`, `fine_label` or `labels`, otherwise the only ClassLabel column.

    If there are several candidates, a warning names the selected column.

    Args:
        dataset: the split.
        split: name of the split, for messages.
        name: the column to use instead.

    Raises:
        ValueError: if there is no label column, or more than one candidate, or the column does not have one label per
            image.
    """
    features = dataset.features
    if name is not None:
        _validate_column_exists(dataset, split, name, "label_column_name")
        _get_label_type(features[name], name, split)
        return name
    class_labels = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    for column in LABEL_COLUMNS:
        if column in features:
            _get_label_type(features[column], column, split)
            candidates = [name for name in features if name in LABEL_COLUMNS or name in class_labels]
            _log_choice("Labels", split, column, candidates, "label_column_name")
            return column
    if len(class_labels) == 1:
        return class_labels[0]
    raise ValueError(
        f"Expected one label column in split '{split}', found {len(class_labels)}. The columns are "
        f"{describe_columns(dataset)}. Choose one with `label_column_name`."
    )


def encode_labels(
    splits: Mapping[str, Dataset], column: str, label_names: Sequence[str] | None = None
) -> tuple[dict[str, Dataset], list[str]]:
    """Convert the label column of all splits to the same ClassLabel. Images are neither read nor copied.

    Args:
        splits: splits by name. The first split (training) determines the classes of string labels.
        column: label column of all splits: ClassLabel, integers (class names "0" to "max"), or strings (classes in
            sorted order).
        label_names: class names to use instead of those in the data, such as those of a trained model.

    Returns:
        The splits, and the class names in order.

    Raises:
        ValueError: if a label is missing, negative or out of range, or the splits have different classes. The message
            names the split and the first index.
    """
    label_types = {
        split: _get_label_type(dataset.features[column], column, split) for split, dataset in splits.items()
    }
    if len(set(label_types.values())) > 1:
        raise ValueError(f"Label column '{column}' must have one type in all splits, got {label_types}.")
    label_type = next(iter(label_types.values()))
    encoded = {split: _read_label_ids(dataset, column, label_type, split) for split, dataset in splits.items()}

    first_split, (names, _) = next(iter(encoded.items()))
    if label_type == "integer":
        names = max((split_names for split_names, _ in encoded.values()), key=len)
        # Integer labels have no names.
        if label_names is not None and len(names) <= len(label_names):
            names = list(label_names)
        encoded = {split: (names, label_ids) for split, (_, label_ids) in encoded.items()}
        used = np.unique(np.concatenate([label_ids for _, label_ids in encoded.values()]))
        if label_names is None and len(used) < len(names):
            logger.warning(
                "Column '%s' has %d different labels up to %d, and each number from 0 is a class: %d of the %d "
                "classes have no images. Number the labels from 0 without gaps if this is wrong.",
                column,
                len(used),
                len(names) - 1,
                len(names) - len(used),
                len(names),
            )
    if label_names is not None:
        names, first_split = list(label_names), "the expected label names"
    for split, (split_names, label_ids) in encoded.items():
        # For strings, only the labels that occur are compared: a small evaluation split may lack some classes.
        if label_type == "class" and label_names is None and split_names != names:
            raise ValueError(
                f"Splits '{first_split}' and '{split}' must share the label names of column '{column}', got "
                f"{_format_names(names)} and {_format_names(split_names)}. Use the same classes in the same order."
            )
        known = set(names)
        unknown = np.isin(label_ids, [index for index, name in enumerate(split_names) if name not in known])
        if unknown.any():
            row = int(np.flatnonzero(unknown)[0])
            raise ValueError(
                f"Split '{split}' has the label {split_names[label_ids[row]]!r} at index {row} of column '{column}', "
                f"which is not among the {len(names)} classes of {first_split}: {_format_names(names)}. Remove such "
                "rows or choose another split with `eval_split`."
            )
    return {
        split: replace_label_column(dataset, column, *encoded[split], names) for split, dataset in splits.items()
    }, names


def read_labels(dataset: Dataset, column: str) -> pa.ChunkedArray:
    """Read the values of one column without reading the others."""
    return dataset.select_columns([column]).with_format("arrow")[:].column(column)


def _validate_column_exists(dataset: Dataset, split: str, name: str, parameter: str) -> None:
    if name not in dataset.column_names:
        raise ValueError(
            f"Split '{split}' has no column '{name}'. The columns are {describe_columns(dataset)}. Choose one with "
            f"`{parameter}`."
        )


def _log_choice(what: str, split: str, column: str, candidates: Sequence[str], parameter: str) -> None:
    others = [name for name in candidates if name != column]
    if others:
        logger.warning(
            "%s of split '%s' are read from column '%s'. Other candidates are %s. Choose one with `%s`.",
            what,
            split,
            column,
            ", ".join(map(repr, others)),
            parameter,
        )


def _can_hold_images(feature: FeatureType) -> bool:
    if isinstance(feature, Value):
        return feature.dtype in ("string", "large_string", "binary", "large_binary")
    return isinstance(feature, Image) or (isinstance(feature, dict) and bool({"bytes", "path"} & set(feature)))


def _get_label_type(feature: FeatureType, column: str, split: str) -> str:
    if isinstance(feature, ClassLabel):
        return "class"
    if isinstance(feature, Value) and feature.dtype.startswith(("int", "uint")):
        return "integer"
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        return "string"
    raise ValueError(
        f"Label column '{column}' of split '{split}' must have one ClassLabel, integer or string per image, got "
        f"{feature}. Choose another column with `label_column_name`."
    )


def _read_label_ids(dataset: Dataset, column: str, label_type: str, split: str) -> tuple[list[str], np.ndarray]:
    """Read the class names of a split, and the index of each row's label in them."""
    values = read_labels(dataset, column)
    if values.null_count:
        row = int(np.flatnonzero(pc.is_null(values).to_numpy(zero_copy_only=False))[0])
        raise ValueError(
            f"Split '{split}' has no label at index {row} of column '{column}' (None). Remove rows without a label, "
            "or choose another split or another column with `label_column_name`."
        )
    if label_type == "string":
        names = sorted(pc.unique(values).to_pylist())
        if blank := [name for name in names if not name.strip()]:
            row = int(np.flatnonzero(pc.equal(values, blank[0]).to_numpy(zero_copy_only=False))[0])
            raise ValueError(
                f"Split '{split}' has no label at index {row} of column '{column}' ({blank[0]!r}). Remove the rows "
                "without a label, or choose another split or another column with `label_column_name`."
            )
        position = pc.index_in(values, value_set=pa.array(names, type=values.type))
        return names, position.to_numpy().astype(np.int64)
    label_ids = values.to_numpy()
    if label_ids.dtype == np.uint64:
        label_ids = label_ids.clip(max=np.uint64(np.iinfo(np.int64).max))
    # Comparisons need a signed and wide type.
    label_ids = label_ids.astype(np.int64)
    if label_type == "class":
        names = list(dataset.features[column].names)
    else:
        # Larger values are identifiers, not classes.
        known = label_ids[label_ids < MAX_NUM_CLASSES]
        names = [str(index) for index in range(int(known.max(initial=-1)) + 1)]
    invalid = (label_ids < 0) | (label_ids >= len(names))
    if invalid.any():
        row = int(np.flatnonzero(invalid)[0])
        label = label_ids[row]
        last = len(names) - 1 if label_type == "class" or label < 0 else MAX_NUM_CLASSES - 1
        hint = "If the column has no class indices, choose another column with `label_column_name`."
        if label < 0:
            hint = "Splits without labels often have -1: choose another split."
        raise ValueError(
            f"Split '{split}' has the label {label} at index {row} of column '{column}'; expected 0 to "
            f"{max(last, 0)}. {hint}"
        )
    return names, label_ids


def replace_label_column(
    dataset: Dataset, column: str, split_names: Sequence[str], label_ids: np.ndarray, names: list[str]
) -> Dataset:
    """Replace a label column by a ClassLabel of other names. Images are neither read nor copied.

    Args:
        dataset: the split.
        column: the label column.
        split_names: names of the labels in the order of `label_ids`.
        label_ids: index of each row's label in `split_names`.
        names: class names in order. Labels that are not among them become -1.
    """
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel) and list(feature.names) == names:
        return dataset
    index_of_name = {name: index for index, name in enumerate(names)}
    new_ids = np.array([index_of_name.get(name, -1) for name in split_names], dtype=np.int64)
    # Unlike `map`, replacing a column does not copy the images to the cache.
    return dataset.remove_columns(column).add_column(column, new_ids[label_ids], feature=ClassLabel(names=names))


def _format_names(names: Sequence[str]) -> str:
    return f"[{format_list(names)}]"
