"""Which column holds the images, which the labels, and one numbering of the classes for all splits.

Hub data sets name their columns differently (CIFAR-10 `img` and `label`, CIFAR-100 `img` and `fine_label`, ImageNet
`image` and `label`) and store labels as numbered classes, bare integers or strings.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Image, Value
from datasets.features.features import FeatureType

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")
MAX_NUM_CLASSES = 1_000_000


def describe_columns(dataset: Dataset) -> str:
    """The columns of a data set with their types, for error messages: `img (Image), fine_label (ClassLabel)`."""
    kinds = {
        name: f.dtype if isinstance(f, Value) else type(f).__name__ for name, f in (dataset.features or {}).items()
    }
    return ", ".join(f"'{name}' ({kind})" for name, kind in kinds.items())


def find_image_column(dataset: Dataset, split: str, name: str | None = None) -> str:
    """The column that holds the images: `name`, else `image` or `img`, else the only image column.

    Where there are others that could be meant, which one it is is logged as a warning.

    Raises:
        ValueError: there is no such column, it cannot hold images, or none or several could be meant.
    """
    features = dataset.features
    if name is not None:
        _require_column(dataset, split, name, "--image_column_name")
        if not _can_hold_images(features[name]):
            raise ValueError(
                f"Column '{name}' of split '{split}' holds no images. Expected a datasets.Image column, image bytes "
                f"or file paths; the columns are {describe_columns(dataset)}. Choose one with --image_column_name."
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
        f"Expected one image column in split '{split}', found {len(images)}; the columns are "
        f"{describe_columns(dataset)}. Name the one to use with --image_column_name."
    )


def find_label_column(dataset: Dataset, split: str, name: str | None = None) -> str:
    """The column that holds the labels: `name`, else `label`, `fine_label` or `labels`, else the only ClassLabel.

    Where there are others that could be meant, which one it is is logged as a warning.

    Raises:
        ValueError: there is no such column, it holds no single label per image, or none or several could be meant.
    """
    features = dataset.features
    if name is not None:
        _require_column(dataset, split, name, "--label_column_name")
        _label_kind(features[name], name, split)
        return name
    numbered = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    for column in LABEL_COLUMNS:
        if column in features:
            _label_kind(features[column], column, split)
            candidates = [name for name in features if name in LABEL_COLUMNS or name in numbered]
            _log_choice("Labels", split, column, candidates, "label_column_name")
            return column
    if len(numbered) == 1:
        return numbered[0]
    raise ValueError(
        f"Expected one label column in split '{split}', found {len(numbered)}; the columns are "
        f"{describe_columns(dataset)}. Name the one to use with --label_column_name."
    )


def encode_labels(
    splits: Mapping[str, Dataset], column: str, label_names: Sequence[str] | None = None
) -> tuple[dict[str, Dataset], list[str]]:
    """Give every split the same ClassLabel column, checked row by row; images are neither read nor rewritten.

    Args:
        splits: splits by name, the one that decides on the numbering of strings (training) first.
        column: the label column, the same in every split: ClassLabel, integers (classes are then named "0" to
            "max") or strings (numbered in sorted order).
        label_names: number the classes as these (those of a trained model, say) instead of as the data do.

    Returns:
        The splits, and the names of the classes in order.

    Raises:
        ValueError: a label is missing, negative or out of range (with split and first index), or the splits do not
            share their classes.
    """
    kinds = {split: _label_kind(dataset.features[column], column, split) for split, dataset in splits.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"Label column '{column}' must have one type in all splits, got {kinds}.")
    kind = next(iter(kinds.values()))
    coded = {split: _read_label_ids(dataset, column, kind, split) for split, dataset in splits.items()}

    first_split, (names, _) = next(iter(coded.items()))
    if kind == "integer":
        names = max((local for local, _ in coded.values()), key=len)
        # Bare integers have a position and no name of their own.
        if label_names is not None and len(names) <= len(label_names):
            names = list(label_names)
        coded = {split: (names, codes) for split, (_, codes) in coded.items()}
        used = np.unique(np.concatenate([codes for _, codes in coded.values()]))
        if label_names is None and len(used) < len(names):
            logger.warning(
                "The labels in column '%s' are %d different numbers up to %d, and every number from 0 on is a class: "
                "%d of the %d classes have no images. Number the labels from 0 without gaps if that is wrong.",
                column,
                len(used),
                len(names) - 1,
                len(names) - len(used),
                len(names),
            )
    if label_names is not None:
        names, first_split = list(label_names), "the expected label names"
    for split, (local, codes) in coded.items():
        # Strings are compared by what occurs: a small evaluation split need not hold every class.
        if kind == "class" and label_names is None and local != names:
            raise ValueError(
                f"Splits '{first_split}' and '{split}' must share the label names of column '{column}', got "
                f"{_shorten(names)} and {_shorten(local)}. Bring both to the same classes in the same order."
            )
        known = set(names)
        unknown = np.isin(codes, [i for i, name in enumerate(local) if name not in known])
        if unknown.any():
            at = int(np.flatnonzero(unknown)[0])
            raise ValueError(
                f"Split '{split}' has the label {local[codes[at]]!r} at index {at} of column '{column}', which is not "
                f"among the {len(names)} classes of {first_split}: {_shorten(names)}. Remove such rows or choose "
                "another split with --eval_split."
            )
    return {
        split: _replace_label_column(dataset, column, *coded[split], names) for split, dataset in splits.items()
    }, names


def read_labels(dataset: Dataset, column: str) -> pa.ChunkedArray:
    """The values of one column, without touching the others."""
    return dataset.select_columns([column]).with_format("arrow")[:].column(column)


def _require_column(dataset: Dataset, split: str, name: str, flag: str) -> None:
    if name not in dataset.column_names:
        raise ValueError(
            f"Split '{split}' has no column '{name}'; the columns are {describe_columns(dataset)}. "
            f"Choose one with {flag}."
        )


def _log_choice(what: str, split: str, column: str, candidates: Sequence[str], parameter: str) -> None:
    others = [name for name in candidates if name != column]
    if others:
        logger.warning("%s of split '%s' are read from column '%s'. Others that hold such are %s: choose with %s.",
                       what, split, column, ", ".join(map(repr, others)), parameter)  # fmt: skip


def _can_hold_images(feature: FeatureType) -> bool:
    if isinstance(feature, Value):
        return feature.dtype in ("string", "large_string", "binary", "large_binary")
    return isinstance(feature, Image) or (isinstance(feature, dict) and bool({"bytes", "path"} & set(feature)))


def _label_kind(feature: FeatureType, column: str, split: str) -> str:
    if isinstance(feature, ClassLabel):
        return "class"
    if isinstance(feature, Value) and feature.dtype.startswith(("int", "uint")):
        return "integer"
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        return "string"
    raise ValueError(
        f"Label column '{column}' of split '{split}' must hold one ClassLabel, integer or string per image, got "
        f"{feature}. Choose another with --label_column_name."
    )


def _read_label_ids(dataset: Dataset, column: str, kind: str, split: str) -> tuple[list[str], np.ndarray]:
    """Class names as the split itself numbers them, and one valid code per row."""
    values = read_labels(dataset, column)
    if values.null_count:
        at = int(np.flatnonzero(pc.is_null(values).to_numpy(zero_copy_only=False))[0])
        raise ValueError(
            f"Split '{split}' has no label at index {at} of column '{column}' (None). Remove the rows without a "
            "label, or choose another split or another --label_column_name."
        )
    if kind == "string":
        names = sorted(pc.unique(values).to_pylist())
        if blank := [name for name in names if not name.strip()]:
            at = int(np.flatnonzero(pc.equal(values, blank[0]).to_numpy(zero_copy_only=False))[0])
            raise ValueError(
                f"Split '{split}' has no label at index {at} of column '{column}' ({blank[0]!r}). Remove the rows "
                "without a label, or choose another split or another --label_column_name."
            )
        position = pc.index_in(values, value_set=pa.array(names, type=values.type))
        return names, position.to_numpy().astype(np.int64)
    codes = values.to_numpy()
    if codes.dtype == np.uint64:
        codes = codes.clip(max=np.uint64(np.iinfo(np.int64).max))
    # An unsigned or narrow type cannot hold the numbers that the labels are compared with.
    codes = codes.astype(np.int64)
    if kind == "class":
        names = list(dataset.features[column].names)
    else:
        # Numbers beyond that are no classes (identifiers, say), and naming them all would take the memory.
        known = codes[codes < MAX_NUM_CLASSES]
        names = [str(i) for i in range(int(known.max(initial=-1)) + 1)]
    wrong = (codes < 0) | (codes >= len(names))
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        last = len(names) - 1 if kind == "class" or codes[at] < 0 else MAX_NUM_CLASSES - 1
        reason = (
            "Splits published without labels carry -1: choose another split."
            if codes[at] < 0
            else "If these are no numbers of classes, choose another column with --label_column_name."
        )
        raise ValueError(
            f"Split '{split}' has the label {codes[at]} at index {at} of column '{column}'; expected 0 to "
            f"{max(last, 0)}. {reason}"
        )
    return names, codes


def _replace_label_column(
    dataset: Dataset, column: str, local: list[str], codes: np.ndarray, names: list[str]
) -> Dataset:
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel) and list(feature.names) == names:
        return dataset
    number = {name: i for i, name in enumerate(names)}
    renumber = np.array([number.get(name, -1) for name in local], dtype=np.int64)
    # A column of its own beside the table: a `map` would copy every image into the cache.
    return dataset.remove_columns(column).add_column(column, renumber[codes], feature=ClassLabel(names=names))


def _shorten(names: Sequence[str], shown: int = 6) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > shown else ""
    return "[" + ", ".join(repr(name) for name in names[:shown]) + more + "]"
