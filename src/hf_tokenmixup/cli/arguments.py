"""The options of scripts/finetune.py: dataclasses and their parser."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from transformers.hf_argparser import HfArg

from ..configuration import TokenMixupConfigMixin
from ..data import LABEL_MAPPINGS
from ..models import FAMILIES
from ..training.lora import LoraArguments
from ..training.training_args import CHECKPOINTING_NAMES, TokenMixupTrainingArguments
from .option_groups import group_options
from .parser import (
    CACHE_DIR_HELP,
    REVISION_HELP,
    TOKEN_HELP,
    CliParser,
    FullHelpAction,
    ShortHelpFormatter,
    drop_none,
    optional_float,
    optional_int,
    true_or_false,
)
from .recipes import (
    check_removed_values,
    check_unknown_options,
    dump_recipe,
    expand_recipe,
    load_valid_recipe,
    merge_options,
    recipe_hint,
    split_lists,
)

RECIPE_HELP = (
    "Recipe by name (see hf_tokenmixup/recipes) or path; other flags override it. JSON objects are merged key by key; "
    "{} drops the recipe's."
)
PRINT_RECIPE_HELP = "Print a recipe with its bases and the other flags, as YAML that is a recipe itself, and exit."
DRY_RUN_HELP = "Print what the settings of TokenMixup do in the first batches, and exit without training or writing."


@dataclass
class ModelArguments:
    model_name_or_path: str | None = HfArg(
        default=None,
        help=f"Model on the Hub or folder: any image classifier; TokenMixup needs type {', '.join(FAMILIES)}.",
    )
    from_scratch: bool = HfArg(default=False, help="Initialize the weights; only the model's configuration is loaded.")
    model_type: str | None = HfArg(
        default=None,
        help=f"With --from_scratch and no model name: the type of model, such as {', '.join(FAMILIES)}.",
    )
    config_overrides: str | None = HfArg(
        default=None,
        help='Attributes of the model configuration as JSON: {"hidden_size": 96}. Merged with those of a recipe.',
    )
    ignore_mismatched_sizes: bool = HfArg(
        default=False, help="Train a new classifier if the classes or their number differ."
    )
    attn_implementation: str | None = HfArg(
        default=None, help="Attention: sdpa, eager, flash_attention_2, ... (transformers' choice)."
    )
    image_processor_name: str | None = HfArg(default=None, help="Image processor to use instead of the model's.")
    image_processor_overrides: str | None = HfArg(
        default=None,
        help='Attributes of the image processor as JSON: {"resample": 3}. Merged with those of a recipe.',
    )
    image_size: list[int] | None = HfArg(
        default=None,
        help="Side of images, or height and width, for model and image processor; learned positions are interpolated.",
    )
    image_mean: list[float] | None = HfArg(
        default=None, help="Normalization mean per channel (the image processor's)."
    )
    image_std: list[float] | None = HfArg(
        default=None, help="Normalization standard deviation per channel (the image processor's)."
    )
    model_revision: str | None = HfArg(default=None, help=REVISION_HELP)
    token: str | None = HfArg(default=None, help=TOKEN_HELP)
    license: str | None = HfArg(
        default=None,
        help="License in the model card, as the Hub names it: apache-2.0, mit, ... (default: none).",
    )
    cache_dir: str | None = HfArg(default=None, help=CACHE_DIR_HELP)

    def parse_config_overrides(self) -> dict[str, Any]:
        """`config_overrides` as a dictionary.

        Raises:
            ValueError: It is not a JSON object.
        """
        return _parse_json_object("config_overrides", self.config_overrides, '{"hidden_size": 96}')

    def parse_image_processor_overrides(self) -> dict[str, Any]:
        """`image_processor_overrides` as a dictionary.

        Raises:
            ValueError: It is not a JSON object.
        """
        return _parse_json_object("image_processor_overrides", self.image_processor_overrides, '{"resample": 3}')

    def hub_kwargs(self) -> dict[str, str]:
        """Keyword arguments for `from_pretrained`."""
        return drop_none(revision=self.model_revision, token=self.token, cache_dir=self.cache_dir)


def _parse_json_object(name: str, text: str | None, example: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"--{name} must be a JSON object such as '{example}', got {text!r}.")
    return value


@dataclass
class EvalDataArguments:
    """Data options of commands that do not train."""

    _argument_group_name = "data"

    dataset_name: str | None = HfArg(
        default=None, help="Dataset on the Hub, folder of parquet files, or digits (included)."
    )
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the dataset.")
    validation_dir: str | None = HfArg(default=None, help="Folder of evaluation images, one subfolder per class.")
    image_column_name: str | None = HfArg(default=None, help="Column of the images (detected).")
    label_column_name: str | None = HfArg(default=None, help="Column of the labels (detected).")
    classes: list[str] | None = HfArg(
        default=None, help="Names of the classes to use (all), numbered in the order of the dataset."
    )
    eval_split: str | None = HfArg(default=None, help="Split to evaluate on (default: validation, else test).")
    train_val_split: float | None = HfArg(
        default=None, help="Fraction of train to evaluate on if there is no other split (default: none)."
    )
    max_eval_samples: int | None = HfArg(default=None, help="Evaluate on up to N images, drawn with --seed.")
    streaming: bool = HfArg(default=False, help="Read the dataset while it is used, without downloading it first.")
    label_mapping: str = HfArg(
        default="strict",
        help="Evaluating a trained model: its classes are the dataset's, in order (strict), or are matched by name or "
        "number.",
        metadata={"choices": list(LABEL_MAPPINGS)},
    )

    def __post_init__(self):
        fraction = self.train_val_split
        if fraction is not None and not 0 < fraction < 1:
            raise ValueError(f"--train_val_split must be above 0 and below 1, got {fraction}.")


@dataclass
class DataArguments(EvalDataArguments):
    """Data options of commands that train."""

    train_dir: str | None = HfArg(default=None, help="Folder of training images, one subfolder per class.")
    train_split: str = HfArg(default="train", help="Split to train on.")
    eval_split: str | None = HfArg(
        default=None, help="Split to evaluate on (default: validation, else test, else a fraction of train)."
    )
    train_val_split: float = HfArg(default=0.1, help="Fraction of train to evaluate on if there is no other split.")
    max_train_samples: int | None = HfArg(default=None, help="Train on up to N images, drawn with --seed.")
    image_cache_gib: float = HfArg(
        default=1.0, help="Cache the decoded images of a split in memory if they need up to N GiB (0: never)."
    )
    shuffle_buffer: int = HfArg(
        default=5000, help="With --streaming: undecoded images that a process shuffles at a time."
    )


@dataclass
class AugmentationArguments:
    crop_scale: list[float] = HfArg(
        default_factory=lambda: [0.08, 1.0], help="Area of the random crop, minimum and maximum fraction."
    )
    crop_ratio: list[float] = HfArg(
        default_factory=lambda: [3 / 4, 4 / 3], help="Width to height of the random crop, minimum and maximum."
    )
    hflip: float = HfArg(default=0.5, help="Probability of a horizontal flip.")
    color_jitter: float | None = HfArg(default=None, help="Strength of color jitter.")
    auto_augment: str | None = HfArg(
        default=None, help="RandAugment or AutoAugment policy of timm: rand-m9-mstd0.5-inc1, ..."
    )
    random_erasing: float = HfArg(default=0.0, help="Probability of random erasing.")
    erasing_mode: str = HfArg(
        default="pixel", help="Content of an erased area: pixel (noise), rand (one color) or const (zero)."
    )
    erase_after_mixing: bool = HfArg(
        default=False, help="Erase on the device, after mixup and CutMix, instead of before."
    )
    train_interpolation: str | None = HfArg(
        default=None,
        help="Interpolation of training images: bilinear, bicubic, ..., or random (one of these two for each image); "
        "by default that of the image processor.",
    )


@dataclass(frozen=True)
class ParsedArguments:
    """The options of a command line and its recipe.

    Attributes:
        model: which model, and its image processor.
        data: which images and labels.
        augmentation: of the training images.
        training: of the `TokenMixupTrainer`.
        lora: of the adapters.
        tokenmixup: settings of TokenMixup by name, only those that were given.
        recipe: name or path; None without a recipe.
        dry_run: whether to forecast the effect of the settings instead of training.
    """

    model: ModelArguments
    data: DataArguments
    augmentation: AugmentationArguments
    training: TokenMixupTrainingArguments
    lora: LoraArguments
    tokenmixup: dict[str, Any]
    recipe: str | None
    dry_run: bool


def build_parser(description: str = "") -> CliParser:
    """The parser of all options; its result lacks the settings of TokenMixup that are not given."""
    shared = CliParser([ModelArguments, DataArguments, AugmentationArguments, LoraArguments], add_help=False)
    shared.add_argument("--recipe", help=RECIPE_HELP)
    shared.add_argument("--print_recipe", metavar="RECIPE", help=PRINT_RECIPE_HELP)
    shared.add_argument("--dry_run", action="store_true", help=DRY_RUN_HELP)
    for setting in dataclasses.fields(TokenMixupConfigMixin):
        default = getattr(TokenMixupConfigMixin(), setting.name)
        kwargs = {"type": type(default), "default": argparse.SUPPRESS, "choices": setting.metadata.get("choices")}
        if isinstance(default, list):
            kwargs |= {"type": int, "nargs": "*", "metavar": "LAYER"}
        elif isinstance(default, bool):
            kwargs |= {"type": true_or_false, "nargs": "?", "const": True, "metavar": "BOOL"}
        elif setting.type in ("float | None", float | None):
            kwargs["type"] = optional_float
        elif setting.type in ("int | None", int | None):
            kwargs["type"] = optional_int
        flags = dict.fromkeys((f"--{setting.name}", f"--{setting.name.replace('_', '-')}"))
        shown = f"on; --{setting.name} false turns it off" if default is True else _format_default(default)
        shared.add_argument(*flags, help=f"{setting.metadata['help']} (new models: {shown})", **kwargs)
    parser = CliParser(
        TokenMixupTrainingArguments,
        parents=[shared],
        usage="%(prog)s [--recipe RECIPE] [options]",
        description=description,
        formatter_class=ShortHelpFormatter,
        add_help=False,
    )
    group_options(parser)
    parser.add_argument("-h", "--help", action="help", help="Show the common options.")
    parser.add_argument(
        "--help_all",
        action=FullHelpAction,
        help="Show all options, also the less common ones of transformers' TrainingArguments.",
    )
    return parser


def _format_default(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "empty"
    return "none" if value is None else str(value)


def parse_options(arguments: Sequence[str], description: str = "") -> ParsedArguments:
    """Parse a command line after the options of its recipe were inserted before it.

    Args:
        arguments: as typed.
        description: is shown by `--help`.

    Raises:
        ValueError: There is no such option or key of the recipe, or a value cannot be used. The message has the most
            similar option, or the recipe if it sets the value.
    """
    parser = build_parser(description)
    expanded = _use_newer_names(expand_recipe(arguments, parser))
    check_removed_values(expanded, parser)
    try:
        # A misspelled option may be the reason why the values of others are rejected.
        remaining = parser.parse_known_args(expanded)[1]
        if not remaining:
            training, namespace = parser.parse_args_into_dataclasses(expanded, look_for_args_file=False)
    except ValueError as error:
        raise ValueError(f"{error}{recipe_hint(str(error), arguments)}") from error
    check_unknown_options(remaining, parser)
    given = vars(namespace)
    if given.pop("print_recipe") is not None:
        raise ValueError("--print_recipe is an option of finetune.py alone. Remove it.")

    def take(group: type) -> Any:
        return group(**{item.name: given.pop(item.name) for item in dataclasses.fields(group)})

    return ParsedArguments(
        model=take(ModelArguments),
        data=take(DataArguments),
        augmentation=take(AugmentationArguments),
        lora=take(LoraArguments),
        training=training,
        recipe=given.pop("recipe"),
        dry_run=given.pop("dry_run"),
        tokenmixup=given,
    )


def format_recipe(name_or_path: str, arguments: Sequence[str] = ()) -> str:
    """A recipe with the options of its bases, overridden by a command line, as the text of a recipe without a base.

    Args:
        name_or_path: of the recipe.
        arguments: options that override the recipe's.

    Raises:
        ValueError: There is no such recipe, base, key or option, or a value is not accepted.
    """
    parser = build_parser()
    options = load_valid_recipe(name_or_path, parser)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    words = _use_newer_names(split_lists(arguments, parser))
    namespace, remaining = parser.parse_known_args(words)
    check_unknown_options(remaining, parser)
    given = vars(namespace)
    given.pop("dry_run", None)
    if "recipe" in given:
        raise ValueError("--print_recipe and --recipe cannot be used together. Remove --recipe.")
    # In a recipe, null is the same as no value.
    changes = {name: "none" if value is None else _to_plain_value(value) for name, value in given.items()}
    return dump_recipe(merge_options(options, changes))


def _to_plain_value(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _use_newer_names(arguments: Sequence[str]) -> list[str]:
    """A command line with one name for each setting of checkpointing, so that the last of either name applies."""
    renamed = []
    for word in arguments:
        name, equals, value = word.partition("=")
        newer = CHECKPOINTING_NAMES.get(name.removeprefix("--").replace("-", "_")) if name.startswith("--") else None
        renamed.append(f"--{newer}{equals}{value}" if newer else word)
    return renamed
