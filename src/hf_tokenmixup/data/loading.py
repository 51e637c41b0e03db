"""From a name or a folder to checked training and evaluation splits with known columns and classes.

Three sources: a dataset of the Hub (or a local folder that `load_dataset` opens, parquet say), folders of images with
one subfolder per class, and `digits`, which is embedded in the package.
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

from .columns import encode_labels, find_image_column, find_label_column, read_labels
from .digits import load_digits_dataset
from .folder_listing import TABLE_EXTENSIONS
from .image_folders import find_image_folders, find_tables, load_image_folders

logger = logging.getLogger(__name__)

EVALUATION_SPLITS = ("validation", "valid", "val", "test")
PATHS_TRIED = 32


@dataclass(frozen=True)
class ImageDatasetSplits:
    """What `load_image_dataset` found. Splits that were not asked for are None, and so are their names.

    `eval_split` is a name of the data set, or says which share of the training split it is. `label_names[i]` is the
    name of class i in both splits. `eval_is_split_from_train`: the evaluation split is such a share.
    `eval_fingerprint` is that of the evaluation split as it was loaded, whole and unchanged, and `revision` the commit
    of a data set of the Hub.
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
    do_train: bool = True,
    do_eval: bool = True,
    label_names: Sequence[str] | None = None,
) -> ImageDatasetSplits:
    """Load the splits that are needed, find their columns, number their classes and check every label.

    Args:
        dataset_name: `digits`, a dataset of the Hub, a local folder that `load_dataset` opens, or a local folder of
            images, with one subfolder per split or per class.
        dataset_config_name: configuration of that data set, where it has several.
        train_dir, validation_dir: folders of images, one subfolder per class; instead of `dataset_name`. See
            `load_image_folders`.
        image_column_name: default `image` or `img`, else the only image column. A column of strings has paths,
            relative to the data files, to `dataset_name` or to the working directory.
        label_column_name: default `label`, `fine_label` or `labels`, else the only ClassLabel column.
        eval_split: default `validation` (or `valid`, `val`), else `test`, else a share of the training split that is
            then not trained on; which one is logged as a warning.
        validation_fraction: that share, above 0 and below 1; seeded, stratified where every class allows it. None:
            never a share of the training split.
        max_train_samples, max_eval_samples: use a seeded random subset of this size (not the first rows: many data
            sets are sorted by class). A number above the size of the split means the whole split.
        do_train, do_eval: what is needed. The other split is then neither required nor checked.
        label_names: number the classes as these, for instance those of the model that is evaluated.

    Raises:
        ValueError: no source or two, no such data set, folder, split or column, nothing in it, labels missing or out
            of range, splits of different classes, one class alone to train on, or a number out of its range.
    """
    for name, size in (("max_train_samples", max_train_samples), ("max_eval_samples", max_eval_samples)):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1 (or left out for the whole split), got {size}.")
    if validation_fraction is not None and not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie above 0 and below 1, got {validation_fraction}.")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}.")
    if not (do_train or do_eval):
        raise ValueError("Neither do_train nor do_eval: expected at least one split to load.")

    source = _load(
        dataset_name,
        dataset_config_name,
        train_dir,
        # An evaluation folder that is not needed is not read.
        validation_dir if do_eval or train_dir is None else None,
        cache_dir,
        token,
        image_column=image_column_name,
        label_column=label_column_name,
        training=do_train and train_split == "train",
    )
    chosen_eval = resolve_eval_split(source, train_split, eval_split) if do_eval else None
    carve = do_eval and chosen_eval is None
    if carve and validation_fraction is None:
        raise ValueError(
            f"No evaluation split among {sorted(source)}: name the split to evaluate on with --eval_split, or the "
            "share of train that was kept from training with --train_val_split."
        )
    used = [train_split] if do_train or carve else []
    used += [chosen_eval] if chosen_eval is not None and chosen_eval not in used else []
    for split in used:
        validate_split(source, split, "--train_split" if do_train and split == train_split else "--eval_split")

    image_column = find_image_column(source[used[0]], used[0], image_column_name)
    label_column = find_label_column(source[used[0]], used[0], label_column_name)
    if label_column == image_column:
        raise ValueError(
            f"Column '{image_column}' cannot hold both images and labels: name two with --image_column_name and "
            "--label_column_name."
        )
    for split in used[1:]:
        find_image_column(source[split], split, image_column)
        find_label_column(source[split], split, label_column)
    splits, names = _number(source, used, train_split, label_column, label_names)
    splits = {split: _with_located_images(dataset, image_column, dataset_name) for split, dataset in splits.items()}
    if do_train and len(names) < 2:
        raise ValueError(
            f"Expected at least two classes to train on, and column '{label_column}' of split '{train_split}' has "
            f"{len(names)}: {names}. Choose another with --label_column_name."
        )
    if train_dir is not None and validation_dir is not None:
        _validate_eval_classes(splits, label_column, names)

    evaluation, eval_name = None, chosen_eval
    if chosen_eval is not None:
        evaluation = splits[chosen_eval]
    train = splits.get(train_split)
    if carve:
        train, evaluation = _train_test_split(train, label_column, validation_fraction, seed)
        eval_name = f"{train_split} (held out: {validation_fraction:.3g} of it, seed {seed})"
        logger.warning(
            "No evaluation split among %s: evaluating on %d of the %d images of '%s' (validation_fraction=%g, seed "
            "%d), which are not trained on.",
            sorted(source),
            len(evaluation),
            len(train) + len(evaluation),
            train_split,
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
        eval_is_split_from_train=carve,
        eval_fingerprint=source[chosen_eval or train_split]._fingerprint if do_eval else None,
        revision=_hub_commit(source[used[0]]),
    )


def _load(
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
    folders = {split: given for split, given in folders.items() if given[1] is not None}
    if bool(dataset_name) == bool(folders):
        raise ValueError(
            "Expected either --dataset_name or image folders (--train_dir, --validation_dir), got "
            f"dataset_name={dataset_name!r}, train_dir={train_dir!r}, validation_dir={validation_dir!r}. "
            "'--dataset_name digits' needs no download."
        )
    if dataset_name == "digits":
        if config_name is not None:
            raise ValueError(
                f"The digits have no configurations, got --dataset_config_name {config_name}: leave it out."
            )
        return load_digits_dataset()
    options = {"label_column": label_column, "cache_dir": cache_dir}
    if folders:
        return load_image_folders(folders, training=training, **options)
    if config_name is None and (found := find_image_folders(dataset_name)) is not None:
        if image_column is None or not (tables := find_tables(dataset_name)):
            return load_image_folders(found, training=training, required=False, **options)
        # By itself, `load_dataset` would take the images for the dataset.
        builder = "json" if "json" in os.path.splitext(next(iter(tables.values())))[1] else "csv"
        return _open(repr(dataset_name), builder, data_files=tables, cache_dir=cache_dir)
    return _open(repr(dataset_name), dataset_name, name=config_name, cache_dir=cache_dir, token=token)


def _open(source: str, builder: str, **options: Any) -> DatasetDict:
    """`load_dataset`, whose errors as a rule do not say what was being opened."""
    try:
        return load_dataset(builder, **options)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"No data set {source}: expected 'digits', a data set of the Hub (a gated or private one needs "
            f"`hf auth login`, and its terms accepted) or a local folder with data files. ({error})"
        ) from error
    except (ValueError, DatasetsError) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(
                f"There are no images in {source}: expected data files with at least one row, or folders with one "
                "subfolder of images per class."
            ) from error
        reason = error.__cause__ or error
        raise ValueError(
            f"The data set {source} cannot be read: {reason} (If a file is damaged, download or write it anew; if the "
            "data set has several configurations, choose one with --dataset_config_name.)"
        ) from error


def _with_located_images(dataset: Dataset, column: str, dataset_name: str | None) -> Dataset:
    """The dataset with its image paths, if the column has relative ones, found where they are.

    Raises:
        ValueError: none of the first of them is anywhere.
    """
    feature = dataset.features[column]
    if not isinstance(feature, Value) or "string" not in feature.dtype:
        return dataset
    paths = read_labels(dataset, column).to_pylist()
    relative = [path for path in paths if path and not os.path.isabs(path) and "://" not in path]
    if not relative:
        return dataset
    tried = relative[:PATHS_TRIED]
    folders = list(_folders_of_tables(dataset_name))
    folder = next((f for f in folders if any(os.path.isfile(os.path.join(f, path)) for path in tried)), None)
    if folder is None:
        raise ValueError(
            f"Column '{column}' has paths of images that are not there: {', '.join(map(repr, tried[:3]))}, looked for "
            f"in {', '.join(folders)}. Write them relative to the folder of the data file, or absolute."
        )
    found = [os.path.join(folder, path) if path and "://" not in path else path for path in paths]
    return dataset.remove_columns(column).add_column(column, found, feature=Value("string"))


def _folders_of_tables(dataset_name: str | None) -> Iterator[str]:
    """What the paths in a table may be relative to: the dataset's folder, those of its tables, the current one."""
    if dataset_name is not None and os.path.isdir(dataset_name):
        root = os.path.abspath(dataset_name)
        yield root
        for folder, _, names in os.walk(root):
            if folder != root and any(os.path.splitext(name)[1].lower() in TABLE_EXTENSIONS for name in names):
                yield folder
    yield os.getcwd()


def _hub_commit(dataset: Dataset) -> str | None:
    """The commit that a data set of the Hub was downloaded from: `datasets` names the folder of its cache after it."""
    folders = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    commit = folders.pop() if len(folders) == 1 else ""
    return commit if re.fullmatch("[0-9a-f]{40}", commit) else None


def resolve_eval_split(source: DatasetDict, train_split: str, eval_split: str | None) -> str | None:
    if eval_split is not None:
        if eval_split == train_split:
            logger.warning("Evaluating on '%s', the split that is trained on.", eval_split)
        return eval_split
    found = next((split for split in EVALUATION_SPLITS if split in source and split != train_split), None)
    if found is not None and found != "validation":
        logger.warning("No split 'validation' among %s: evaluating on '%s'.", sorted(source), found)
    return found


def validate_split(source: DatasetDict, split: str, flag: str) -> None:
    if split not in source:
        raise ValueError(f"No split '{split}'; the splits are {sorted(source)}. Choose one with {flag}.")


def _number(
    source: DatasetDict, used: list[str], train_split: str, column: str, label_names: Sequence[str] | None
) -> tuple[dict[str, Dataset], list[str]]:
    """Number the classes of the used splits; strings as the training split has them, even if only evaluating."""
    splits = {split: source[split] for split in used}
    train = source.get(train_split)
    by_name = label_names is None and train is not None and column in train.column_names
    if by_name and train_split not in splits and not isinstance(train.features[column], ClassLabel):
        splits = {train_split: train, **splits}
    return encode_labels(splits, column, label_names)


def _validate_eval_classes(splits: dict[str, Dataset], column: str, names: list[str]) -> None:
    """Bare integers are numbered together, so that a class of the evaluation images alone would get a number too."""
    occurring = {split: set(read_labels(dataset, column).unique().to_pylist()) for split, dataset in splits.items()}
    if "train" in occurring and (unseen := set().union(*occurring.values()) - occurring["train"]):
        raise ValueError(
            f"validation_dir has classes that train_dir has no images of: {sorted(names[i] for i in unseen)}. "
            "Bring both to the same classes."
        )


def _train_test_split(train: Dataset, column: str, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    labels = read_labels(train, column).to_numpy()
    held_out = max(1, round(fraction * len(labels)))
    if len(labels) - held_out < 1:
        raise ValueError(
            f"Cannot hold {held_out} of {len(labels)} training images out for evaluation: at least one must be left "
            "to train on. Name an evaluation split with --eval_split or give more images."
        )
    _, per_class = np.unique(labels, return_counts=True)
    stratify = per_class.min() > 1 and min(held_out, len(labels) - held_out) >= len(per_class)
    kept, taken = train_test_split(
        np.arange(len(labels)), test_size=held_out, random_state=seed, stratify=labels if stratify else None
    )
    return _select(train, kept), _select(train, taken)


def _sample_subset(dataset: Dataset, size: int | None, seed: int) -> Dataset:
    if size is None or size >= len(dataset):
        return dataset
    return _select(dataset, np.random.default_rng(seed).permutation(len(dataset))[:size])


def _select(dataset: Dataset, indices: np.ndarray) -> Dataset:
    return dataset.select(np.sort(indices), keep_in_memory=True)
