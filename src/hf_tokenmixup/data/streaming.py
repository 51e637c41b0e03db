"""From a name to streamed training and evaluation splits with known columns, classes and, where possible, lengths."""

import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from datasets import ClassLabel, DatasetBuilder, IterableDataset, load_dataset_builder
from datasets.packaged_modules.parquet.parquet import Parquet

from .columns import find_image_column, find_label_column
from .image_folders import find_image_folders
from .loading import ImageDatasetSplits, resolve_eval_split, validate_split


@dataclass(frozen=True)
class StreamingImageDatasetSplits(ImageDatasetSplits):
    """What `load_streaming_image_dataset` found: an `ImageDatasetSplits` of streamed splits, and how many images they
    hold, if known."""

    train: IterableDataset | None
    evaluation: IterableDataset | None
    num_train_examples: int | None = None
    num_eval_examples: int | None = None


def load_streaming_image_dataset(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_dir: str | None = None,
    validation_dir: str | None = None,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
    *,
    do_train: bool = True,
    do_eval: bool = True,
) -> StreamingImageDatasetSplits:
    """Find the splits that are needed, their columns and classes, without downloading them.

    Arguments are those of `load_image_dataset`. Labels are checked as they are read
    (`ImageClassificationIterableDataset`).

    Raises:
        ValueError: no data set, or one that has no stream; no such split or column; classes that cannot be known
            without reading everything; or an option that needs the whole split (`max_train_samples`,
            `max_eval_samples`, a share of train to evaluate on).
    """
    folders = bool(train_dir or validation_dir)
    if folders or not dataset_name or dataset_name == "digits" or find_image_folders(dataset_name) is not None:
        raise ValueError(
            "--streaming reads a data set of the Hub or a folder of parquet files, --dataset_name, got "
            f"dataset_name={dataset_name!r}, train_dir={train_dir!r}, validation_dir={validation_dir!r}. Leave "
            "--streaming out: image folders are read file by file without it, and digits lie in memory."
        )
    for option, size, hint in (
        ("max_train_samples", max_train_samples, "train for fewer steps with --max_steps"),
        ("max_eval_samples", max_eval_samples, "name a smaller split with --eval_split"),
    ):
        if size is not None:
            raise ValueError(
                f"--{option} draws from the whole split, which a stream would have to read to its end: leave it out "
                f"and {hint}, or leave out --streaming."
            )
    if not (do_train or do_eval):
        raise ValueError("Neither do_train nor do_eval: expected at least one split to load.")

    builder = _builder(dataset_name, dataset_config_name, cache_dir, token)
    source = builder.as_streaming_dataset()
    chosen_eval = resolve_eval_split(source, train_split, eval_split) if do_eval else None
    if do_eval and chosen_eval is None:
        raise ValueError(
            f"No evaluation split among {sorted(source)}, and no share of a stream can be held out: name the split to "
            "evaluate on with --eval_split, do not evaluate, or leave out --streaming."
        )
    used = [train_split] if do_train else []
    used += [chosen_eval] if chosen_eval is not None and chosen_eval not in used else []
    for split in used:
        validate_split(source, split, "--train_split" if do_train and split == train_split else "--eval_split")
        if source[split].features is None:
            raise ValueError(
                f"The columns of split '{split}' are not known before it is read: store the data set as parquet files "
                "with their features (`Dataset.push_to_hub` does), or leave out --streaming."
            )
    # The builder gives all its splits the same features.
    image_column = find_image_column(source[used[0]], used[0], image_column_name)
    label_column = find_label_column(source[used[0]], used[0], label_column_name)
    feature = source[used[0]].features[label_column]
    if not isinstance(feature, ClassLabel):
        raise ValueError(
            f"Label column '{label_column}' of split '{used[0]}' holds {feature.dtype}: the classes cannot be told "
            "without reading everything. Choose a ClassLabel column with --label_column_name, leave out --streaming, "
            "or store the labels as ClassLabel (`Dataset.class_encode_column`)."
        )
    counts = {split: _num_images(builder, split) for split in used}
    if 0 in counts.values():
        empty = next(split for split, count in counts.items() if count == 0)
        raise ValueError(
            f"Split '{empty}' of {dataset_name!r} has no images: choose another with --train_split or --eval_split."
        )
    return StreamingImageDatasetSplits(
        train=source[train_split] if do_train else None,
        evaluation=source[chosen_eval] if do_eval else None,
        train_split=train_split if do_train else None,
        eval_split=chosen_eval,
        image_column=image_column,
        label_column=label_column,
        label_names=list(feature.names),
        revision=builder.hash if re.fullmatch("[0-9a-f]{40}", builder.hash or "") else None,
        num_train_examples=counts[train_split] if do_train else None,
        num_eval_examples=counts[chosen_eval] if do_eval else None,
    )


def _builder(name: str, config: str | None, cache_dir: str | None, token: str | bool | None) -> DatasetBuilder:
    try:
        return load_dataset_builder(name, name=config, cache_dir=cache_dir, token=token)
    except FileNotFoundError as error:
        raise ValueError(
            f"No data set {name!r}: expected a data set of the Hub (a gated or private one needs `hf auth login`, and "
            f"its terms accepted) or a local folder with data files. ({error})"
        ) from error


def _num_images(builder: DatasetBuilder, split: str) -> int | None:
    """By the data set's own account, else by the ends of its parquet files where these lie here."""
    splits = builder.info.splits or {}
    if split in splits and splits[split].num_examples:
        return splits[split].num_examples
    if not isinstance(builder, Parquet):
        return None
    files = builder.config.data_files[split]
    if not all(Path(file).is_file() for file in files):
        return None
    return sum(pq.read_metadata(file).num_rows for file in files)
