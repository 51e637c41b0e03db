"""Load streamed training and evaluation splits with their columns, class names and, if known, lengths."""

import re
from collections.abc import Sequence
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
    """Streamed splits of an image dataset, from `load_streaming_image_dataset`.

    Attributes:
        train: streamed training split; None if it was not requested.
        evaluation: streamed evaluation split; None if it was not requested.
        num_train_examples: number of training images, if known.
        num_eval_examples: number of evaluation images, if known.
    """

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
    classes: Sequence[str] | None = None,
    do_train: bool = True,
    do_eval: bool = True,
) -> StreamingImageDatasetSplits:
    """Load streamed splits, and detect their columns and class names, without downloading them.

    The arguments are those of `load_image_dataset`. `ImageClassificationIterableDataset` validates labels when it
    reads them.

    Raises:
        ValueError: if the dataset, a split or a column does not exist, or the dataset cannot be streamed, or the class
            names are unknown before all labels are read, or an argument needs the complete split
            (`max_train_samples`, `max_eval_samples`, `classes`, no evaluation split).
    """
    folders = bool(train_dir or validation_dir)
    if folders or not dataset_name or dataset_name == "digits" or find_image_folders(dataset_name) is not None:
        raise ValueError(
            "`streaming` needs a dataset of the Hub or a folder of parquet files as `dataset_name`, got "
            f"dataset_name={dataset_name!r}, train_dir={train_dir!r}, validation_dir={validation_dir!r}. Remove "
            "`streaming`: image folders are read file by file without it, and digits is in memory."
        )
    for parameter, value, hint in (
        ("max_train_samples", max_train_samples, "train for fewer steps with `max_steps`"),
        ("max_eval_samples", max_eval_samples, "name a smaller split with `eval_split`"),
        ("classes", classes, "store the images of these classes as a dataset of their own"),
    ):
        if value is not None:
            raise ValueError(
                f"`{parameter}` selects images of the complete split, which is not possible for a stream. Remove "
                f"`{parameter}` and {hint}, or remove `streaming`."
            )
    if not (do_train or do_eval):
        raise ValueError("do_train and do_eval are both False. Set at least one of them.")

    builder = _load_builder(dataset_name, dataset_config_name, cache_dir, token)
    dataset_dict = builder.as_streaming_dataset()
    chosen_eval = resolve_eval_split(dataset_dict, train_split, eval_split) if do_eval else None
    if do_eval and chosen_eval is None:
        raise ValueError(
            f"There is no evaluation split among {sorted(dataset_dict)}, and a stream cannot be split. Name the "
            "evaluation split with `eval_split`, do not evaluate, or remove `streaming`."
        )
    loaded_splits = [train_split] if do_train else []
    if chosen_eval is not None and chosen_eval not in loaded_splits:
        loaded_splits.append(chosen_eval)
    for split in loaded_splits:
        validate_split(dataset_dict, split, "train_split" if do_train and split == train_split else "eval_split")
        if dataset_dict[split].features is None:
            raise ValueError(
                f"The columns of split '{split}' are unknown before it is read. Store the dataset as parquet files "
                "with their features (as `Dataset.push_to_hub` does), or remove `streaming`."
            )
    # All splits of a builder have the same features.
    first_split = loaded_splits[0]
    image_column = find_image_column(dataset_dict[first_split], first_split, image_column_name)
    label_column = find_label_column(dataset_dict[first_split], first_split, label_column_name)
    feature = dataset_dict[first_split].features[label_column]
    if not isinstance(feature, ClassLabel):
        raise ValueError(
            f"Label column '{label_column}' of split '{first_split}' has {feature.dtype} values, so its classes are "
            "unknown before all labels are read. Choose a ClassLabel column with `label_column_name`, remove "
            "`streaming`, or store the labels as ClassLabel (`Dataset.class_encode_column`)."
        )
    num_images = {split: _get_num_images(builder, split) for split in loaded_splits}
    if empty := [split for split, count in num_images.items() if count == 0]:
        raise ValueError(
            f"Split '{empty[0]}' of {dataset_name!r} has no images. Choose another split with `train_split` or "
            "`eval_split`."
        )
    return StreamingImageDatasetSplits(
        train=dataset_dict[train_split] if do_train else None,
        evaluation=dataset_dict[chosen_eval] if do_eval else None,
        train_split=train_split if do_train else None,
        eval_split=chosen_eval,
        image_column=image_column,
        label_column=label_column,
        label_names=list(feature.names),
        revision=builder.hash if re.fullmatch("[0-9a-f]{40}", builder.hash or "") else None,
        num_train_examples=num_images[train_split] if do_train else None,
        num_eval_examples=num_images[chosen_eval] if do_eval else None,
    )


def _load_builder(name: str, config: str | None, cache_dir: str | None, token: str | bool | None) -> DatasetBuilder:
    try:
        return load_dataset_builder(name, name=config, cache_dir=cache_dir, token=token)
    except FileNotFoundError as error:
        raise ValueError(
            f"Dataset {name!r} not found. Expected a dataset of the Hub (a gated or private dataset needs `hf auth "
            f"login` and accepted terms) or a local folder with data files. ({error})"
        ) from error


def _get_num_images(builder: DatasetBuilder, split: str) -> int | None:
    """Return the number of images that the dataset states, or that its local parquet files have; None if unknown."""
    splits = builder.info.splits or {}
    if split in splits and splits[split].num_examples:
        return splits[split].num_examples
    if not isinstance(builder, Parquet):
        return None
    files = builder.config.data_files[split]
    if not all(Path(file).is_file() for file in files):
        return None
    return sum(pq.read_metadata(file).num_rows for file in files)
