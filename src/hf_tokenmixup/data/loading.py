"""Load training and evaluation splits, detect columns and label names, and validate labels.

There are three sources: a dataset of the Hub (or a local folder that `load_dataset` opens, such as parquet files),
image folders with one subfolder per class, and `digits`, which is included in scikit-learn.
"""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset
from datasets.exceptions import DatasetsError
from sklearn.model_selection import train_test_split

from .class_selection import select_classes
from .columns import encode_labels, find_image_column, find_label_column, read_labels
from .digits import load_digits_dataset
from .folder_listing import TABLE_EXTENSIONS
from .image_folders import find_image_folders, find_tables, load_image_folders

logger = logging.getLogger(__name__)

EVALUATION_SPLITS = ("validation", "valid", "val", "test")
MAX_PROBED_PATHS = 32


@dataclass(frozen=True)
class ImageDatasetSplits:
    """Splits of an image dataset, from `load_image_dataset`.

    Attributes:
        train: training split; None if it was not requested.
        evaluation: evaluation split; None if it was not requested.
        train_split: name of the training split.
        eval_split: name of the evaluation split, or a description of the held-out fraction of the training split.
        image_column: name of the image column.
        label_column: name of the label column.
        label_names: class names in order, the same for both splits.
        eval_fingerprint: fingerprint of the complete evaluation split.
        eval_is_split_from_train: whether the evaluation split is a fraction of the training split.
        revision: commit of a dataset of the Hub.
    """

    train: Dataset | None
    evaluation: Dataset | None
    train_split: str | None
    eval_split: str | None
    image_column: str
    label_column: str
    label_names: list[str]
    eval_fingerprint: str | None = None
    eval_is_split_from_train: bool = False
    revision: str | None = None


def load_image_dataset(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_dir: str | None = None,
    validation_dir: str | None = None,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    validation_fraction: float | None = 0.1,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 42,
    cache_dir: str | None = None,
    token: str | bool | None = None,
    *,
    classes: Sequence[str] | None = None,
    do_train: bool = True,
    do_eval: bool = True,
    label_names: Sequence[str] | None = None,
) -> ImageDatasetSplits:
    """Load the requested splits, detect their columns, and encode and validate their labels.

    Args:
        dataset_name: `digits`, a dataset of the Hub, a local folder that `load_dataset` opens, or a local image folder
            with one subfolder per split or per class.
        dataset_config_name: configuration of the dataset, if it has several.
        train_dir: image folder with one subfolder per class, instead of `dataset_name`. See `load_image_folders`.
        validation_dir: image folder for evaluation.
        image_column_name: image column. Default: `image` or `img`, otherwise the only image column. A string column
            contains paths relative to the data files, to `dataset_name` or to the working directory.
        label_column_name: label column. Default: `label`, `fine_label` or `labels`, otherwise the only ClassLabel
            column.
        train_split: name of the training split.
        eval_split: name of the evaluation split. Default: `validation` (or `valid`, `val`), otherwise `test`,
            otherwise a fraction of the training split, which is then not used for training. A warning names the
            default.
        validation_fraction: this fraction, above 0 and below 1. The split is seeded, and stratified if each class has
            enough images. None: do not split the training split.
        max_train_samples: maximum number of training images, a seeded random subset. (The first rows of many datasets
            belong to one class.)
        max_eval_samples: maximum number of evaluation images.
        seed: seed of the random subsets and of the held-out fraction.
        cache_dir: cache folder of `datasets`.
        token: token for the Hub.
        classes: names of the classes to use; images of the others are left out. None: all classes.
        do_train: whether the training split is requested. Otherwise it is neither required nor validated.
        do_eval: whether the evaluation split is requested.
        label_names: class names to use instead of those in the data, such as those of the evaluated model.

    Raises:
        ValueError: if there is not exactly one source, or the dataset, a folder, a split or a column does not exist or
            is empty, or labels are missing or out of range, or the splits have different classes, or there is only one
            class for training, or a class of `classes` does not exist, or a number is out of range.
    """
    for name, size in (("max_train_samples", max_train_samples), ("max_eval_samples", max_eval_samples)):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1 (or None for the complete split), got {size}.")
    if validation_fraction is not None and not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be above 0 and below 1, got {validation_fraction}.")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}.")
    if not (do_train or do_eval):
        raise ValueError("do_train and do_eval are both False. Set at least one of them.")

    if do_train and validation_dir is not None and train_dir is None and dataset_name is None:
        raise ValueError(
            f"There are no images to train on, got only validation_dir={validation_dir!r}. Pass `train_dir`, or set "
            "do_train=False."
        )
    dataset_dict = _load_dataset_dict(
        dataset_name,
        dataset_config_name,
        train_dir,
        # An evaluation folder that is not requested is not read.
        validation_dir if do_eval or train_dir is None else None,
        cache_dir,
        token,
        image_column=image_column_name,
        label_column=label_column_name,
        training=do_train and train_split == "train",
    )
    chosen_eval = resolve_eval_split(dataset_dict, train_split, eval_split) if do_eval else None
    split_from_train = do_eval and chosen_eval is None
    if split_from_train and validation_fraction is None:
        raise ValueError(
            f"There is no evaluation split among {sorted(dataset_dict)}. Name the evaluation split with `eval_split`, "
            "or the fraction of the training split that was not used for training with `validation_fraction`."
        )
    loaded_splits = [train_split] if do_train or split_from_train else []
    if chosen_eval is not None and chosen_eval not in loaded_splits:
        loaded_splits.append(chosen_eval)
    for split in loaded_splits:
        validate_split(dataset_dict, split, "train_split" if do_train and split == train_split else "eval_split")

    first_split, *other_splits = loaded_splits
    image_column = find_image_column(dataset_dict[first_split], first_split, image_column_name)
    label_column = find_label_column(dataset_dict[first_split], first_split, label_column_name)
    if label_column == image_column:
        raise ValueError(
            f"Column '{image_column}' cannot contain both images and labels. Name two columns with "
            "`image_column_name` and `label_column_name`."
        )
    for split in other_splits:
        find_image_column(dataset_dict[split], split, image_column)
        find_label_column(dataset_dict[split], split, label_column)
    splits, names = _encode_split_labels(dataset_dict, loaded_splits, train_split, label_column, label_names)
    if classes is not None:
        splits, names = select_classes(splits, label_column, names, classes)
    splits = {split: _resolve_image_paths(dataset, image_column, dataset_name) for split, dataset in splits.items()}
    if do_train and len(names) < 2:
        remedy = "more `classes`" if classes else "another column with `label_column_name`"
        raise ValueError(
            f"Training needs at least two classes, but column '{label_column}' of split '{train_split}' has "
            f"{len(names)}: {names}. Choose {remedy}."
        )
    if train_dir is not None and validation_dir is not None:
        _validate_eval_classes(splits, label_column, names)

    evaluation, eval_name = None, chosen_eval
    if chosen_eval is not None:
        evaluation = splits[chosen_eval]
    train = splits.get(train_split)
    if split_from_train:
        train, evaluation = _train_test_split(train, label_column, validation_fraction, seed)
        eval_name = f"{train_split} (held out: {validation_fraction:.3g} of it, seed {seed})"
        logger.warning(
            "Of the %d images of '%s', %d are for training and %d for evaluation (a fraction of %g, drawn with seed "
            "%d), as there is no other split to evaluate on.",
            len(train) + len(evaluation),
            train_split,
            len(train),
            len(evaluation),
            validation_fraction,
            seed,
        )
    return ImageDatasetSplits(
        train=_sample_subset(train, max_train_samples, seed) if do_train else None,
        evaluation=_sample_subset(evaluation, max_eval_samples, seed) if do_eval else None,
        train_split=train_split if do_train else None,
        eval_split=eval_name,
        image_column=image_column,
        label_column=label_column,
        label_names=names,
        eval_is_split_from_train=split_from_train,
        eval_fingerprint=dataset_dict[chosen_eval or train_split]._fingerprint if do_eval else None,
        revision=_get_hub_commit(dataset_dict[first_split]),
    )


def _load_dataset_dict(
    dataset_name: str | None,
    config_name: str | None,
    train_dir: str | None,
    validation_dir: str | None,
    cache_dir: str | None,
    token: str | bool | None,
    *,
    image_column: str | None,
    label_column: str | None,
    training: bool,
) -> DatasetDict:
    folders = {"train": ("train_dir", train_dir), "validation": ("validation_dir", validation_dir)}
    folders = {split: (name, folder) for split, (name, folder) in folders.items() if folder is not None}
    if bool(dataset_name) == bool(folders):
        raise ValueError(
            "Expected either `dataset_name` or image folders (`train_dir`, `validation_dir`), got "
            f"dataset_name={dataset_name!r}, train_dir={train_dir!r}, validation_dir={validation_dir!r}. "
            "`dataset_name=digits` needs no download."
        )
    if dataset_name == "digits":
        if config_name is not None:
            raise ValueError(
                f"digits has no configurations, got dataset_config_name={config_name!r}. Remove `dataset_config_name`."
            )
        return load_digits_dataset()
    options = {"label_column": label_column, "cache_dir": cache_dir}
    if folders:
        return load_image_folders(folders, training=training, **options)
    if config_name is None and (found := find_image_folders(dataset_name)) is not None:
        if image_column is None or not (tables := find_tables(dataset_name)):
            return load_image_folders(found, training=training, required=False, **options)
        # Given the folder, `load_dataset` would load the images without the table.
        builder = "json" if "json" in os.path.splitext(next(iter(tables.values())))[1] else "csv"
        return _load_dataset_checked(repr(dataset_name), builder, data_files=tables, cache_dir=cache_dir)
    return _load_dataset_checked(repr(dataset_name), dataset_name, name=config_name, cache_dir=cache_dir, token=token)


def _load_dataset_checked(source: str, builder: str, **options: Any) -> DatasetDict:
    """Call `load_dataset`, with errors that name the dataset."""
    try:
        return load_dataset(builder, **options)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"Dataset {source} not found. Expected 'digits', a dataset of the Hub (a gated or private dataset needs "
            f"`hf auth login` and accepted terms) or a local folder with data files. ({error})"
        ) from error
    except (ValueError, DatasetsError) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(
                f"There are no images in {source}. Expected data files with at least one row, or folders with one "
                "subfolder of images per class."
            ) from error
        reason = error.__cause__ or error
        raise ValueError(
            f"Dataset {source} cannot be read: {reason} (If a file is corrupted, download or create it again. If the "
            "dataset has several configurations, choose one with `dataset_config_name`.)"
        ) from error


def _resolve_image_paths(dataset: Dataset, column: str, dataset_name: str | None) -> Dataset:
    """Make relative image paths of a string column absolute.

    Raises:
        ValueError: if none of the first paths exists.
    """
    feature = dataset.features[column]
    if not isinstance(feature, Value) or "string" not in feature.dtype:
        return dataset
    paths = read_labels(dataset, column).to_pylist()
    relative = [path for path in paths if path and not os.path.isabs(path) and "://" not in path]
    if not relative:
        return dataset
    probed = relative[:MAX_PROBED_PATHS]
    folders = list(_list_base_folders(dataset_name))
    folder = next((base for base in folders if any(os.path.isfile(os.path.join(base, path)) for path in probed)), None)
    if folder is None:
        raise ValueError(
            f"Column '{column}' has paths of images that do not exist: {', '.join(map(repr, probed[:3]))}, searched "
            f"in {', '.join(folders)}. Use paths relative to the folder of the data file, or absolute paths."
        )
    resolved = [os.path.join(folder, path) if path and "://" not in path else path for path in paths]
    return dataset.remove_columns(column).add_column(column, resolved, feature=Value("string"))


def _list_base_folders(dataset_name: str | None) -> Iterator[str]:
    """Yield the folders that paths may be relative to: the dataset's, those of its tables, the working directory."""
    if dataset_name is not None and os.path.isdir(dataset_name):
        root = os.path.abspath(dataset_name)
        yield root
        for folder, _, names in os.walk(root):
            if folder != root and any(os.path.splitext(name)[1].lower() in TABLE_EXTENSIONS for name in names):
                yield folder
    yield os.getcwd()


def _get_hub_commit(dataset: Dataset) -> str | None:
    """Return the commit of a dataset of the Hub, which is the name of its folder in the cache."""
    folders = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    commit = folders.pop() if len(folders) == 1 else ""
    return commit if re.fullmatch("[0-9a-f]{40}", commit) else None


def resolve_eval_split(dataset_dict: DatasetDict, train_split: str, eval_split: str | None) -> str | None:
    """Select the evaluation split, and log a warning unless it is a separate split named `validation`.

    Args:
        dataset_dict: all splits.
        train_split: name of the training split.
        eval_split: requested name of the evaluation split.

    Returns:
        The requested name, otherwise the first of `EVALUATION_SPLITS` that exists; None if there is none.
    """
    if eval_split is not None:
        if eval_split == train_split:
            logger.warning("The evaluation split '%s' is also the training split.", eval_split)
        return eval_split
    found = next((split for split in EVALUATION_SPLITS if split in dataset_dict and split != train_split), None)
    if found is not None and found != "validation":
        logger.warning("There is no split 'validation' among %s. Evaluating on '%s'.", sorted(dataset_dict), found)
    return found


def validate_split(dataset_dict: DatasetDict, split: str, parameter: str) -> None:
    """Validate that a split exists.

    Args:
        dataset_dict: all splits.
        split: name of the split.
        parameter: name of the parameter with the split, for the message.

    Raises:
        ValueError: if there is no such split.
    """
    if split not in dataset_dict:
        raise ValueError(
            f"There is no split '{split}'. The splits are {sorted(dataset_dict)}. Choose one with `{parameter}`."
        )


def _encode_split_labels(
    dataset_dict: DatasetDict,
    loaded_splits: list[str],
    train_split: str,
    column: str,
    label_names: Sequence[str] | None,
) -> tuple[dict[str, Dataset], list[str]]:
    """Encode the labels of the loaded splits. The training split determines the order of string labels."""
    splits = {split: dataset_dict[split] for split in loaded_splits}
    train = dataset_dict.get(train_split)
    uses_train_labels = label_names is None and train is not None and column in train.column_names
    if uses_train_labels and train_split not in splits and not isinstance(train.features[column], ClassLabel):
        splits = {train_split: train, **splits}
    return encode_labels(splits, column, label_names)


def _validate_eval_classes(splits: dict[str, Dataset], column: str, names: list[str]) -> None:
    """Validate that all evaluation classes have training images. Integer labels need this after encoding."""
    label_ids = {split: set(read_labels(dataset, column).unique().to_pylist()) for split, dataset in splits.items()}
    if "train" in label_ids and (unseen := set().union(*label_ids.values()) - label_ids["train"]):
        raise ValueError(
            f"validation_dir has classes that train_dir has no images of: {sorted(names[i] for i in unseen)}. "
            "Use the same classes in both."
        )


def _train_test_split(train: Dataset, column: str, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    labels = read_labels(train, column).to_numpy()
    num_eval = max(1, round(fraction * len(labels)))
    if len(labels) - num_eval < 1:
        raise ValueError(
            f"Cannot use {num_eval} of {len(labels)} training images for evaluation, since none would be left for "
            "training. Name an evaluation split with `eval_split`, or add images."
        )
    _, per_class = np.unique(labels, return_counts=True)
    stratify = per_class.min() > 1 and min(num_eval, len(labels) - num_eval) >= len(per_class)
    train_indices, eval_indices = train_test_split(
        np.arange(len(labels)), test_size=num_eval, random_state=seed, stratify=labels if stratify else None
    )
    return _select(train, train_indices), _select(train, eval_indices)


def _sample_subset(dataset: Dataset, size: int | None, seed: int) -> Dataset:
    if size is None or size >= len(dataset):
        return dataset
    return _select(dataset, np.random.default_rng(seed).permutation(len(dataset))[:size])


def _select(dataset: Dataset, indices: np.ndarray) -> Dataset:
    return dataset.select(np.sort(indices), keep_in_memory=True)
