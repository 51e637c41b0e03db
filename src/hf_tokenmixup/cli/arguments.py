"""The options of scripts/finetune.py: dataclasses, parser and help."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformers import HfArgumentParser, TrainingArguments

from ..configuration import TokenMixupConfigMixin
from ..data import LABEL_MAPPINGS
from ..training.lora import LoraArguments
from ..training.training_args import CHECKPOINTING_NAMES, TokenMixupTrainingArguments
from .recipes import check_unknown_options, expand_recipe, keys_of_recipe, refuse_removed_values

TRANSFORMERS_OPTIONS = {item.name for item in dataclasses.fields(TrainingArguments)}
# Versions of transformers before the renaming have it from us.
TRANSFORMERS_OPTIONS |= {"activation_checkpointing_kwargs"}
SHOWN_TRAINING_OPTIONS = """
    do_train do_eval output_dir num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size
    gradient_accumulation_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args
    weight_decay max_grad_norm label_smoothing_factor bf16 fp16 torch_compile activation_checkpointing eval_strategy
    save_strategy save_total_limit load_best_model_at_end metric_for_best_model logging_steps report_to seed use_cpu
    dataloader_num_workers resume_from_checkpoint push_to_hub hub_model_id
"""


RECIPE_HELP = (
    "Recipe by name (see hf_tokenmixup/recipes) or path; other flags override it. JSON objects are merged with the "
    "recipe's key by key; {} drops the recipe's."
)


def option(help: str, default: Any = None, **metadata) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model_name_or_path: str | None = option(
        "Model on the Hub or folder: any image classifier; TokenMixup needs a ViT or CCT."
    )
    from_scratch: bool = option("Take the model's configuration alone, with fresh weights.", False)
    model_type: str | None = option("With --from_scratch and no model name: the type of model, such as vit or cct.")
    config_overrides: str | None = option(
        'Attributes of the model configuration as JSON: {"hidden_size": 96}. Merged with those of a recipe.'
    )
    ignore_mismatched_sizes: bool = option("Start a fresh classifier if the classes or their number differ.", False)
    attn_implementation: str | None = option("Attention: sdpa, eager, flash_attention_2, ... (transformers' choice).")
    image_processor_name: str | None = option("Image processor, if it is not the model's.")
    image_size: list[int] | None = option(
        "Side of images, or height and width, for model and image processor; learned positions are interpolated."
    )
    image_mean: list[float] | None = option("Normalisation mean per channel, if not the image processor's.")
    image_std: list[float] | None = option("Normalisation deviation per channel, if not the image processor's.")
    model_revision: str | None = option("Branch, tag or commit of the model on the Hub.")
    token: str | None = option("Token for the Hub, if not the one of `hf auth login`.")
    license: str | None = option(
        "License of the trained weights in the model card, as the Hub names it: apache-2.0, mit, ... (none)."
    )
    cache_dir: str | None = option("Where downloads are kept.")

    def parse_config_overrides(self) -> dict[str, Any]:
        """``config_overrides`` as a dictionary.

        Raises:
            ValueError: if it is not a JSON object.
        """
        try:
            changes = json.loads(self.config_overrides or "{}")
        except json.JSONDecodeError as error:
            changes = error
        if not isinstance(changes, dict):
            raise ValueError(
                f"--config_overrides must be a JSON object such as '{{\"hidden_size\": 96}}', got "
                f"{self.config_overrides!r}."
            )
        return changes


@dataclass
class EvalDataArguments:
    """What there is to say of the data where nothing is trained."""

    _argument_group_name = "data"

    dataset_name: str | None = option("Dataset on the Hub, folder of parquet files, or digits (embedded).")
    dataset_config_name: str | None = option("Configuration of the dataset.")
    validation_dir: str | None = option("Folder of evaluation images, one subfolder per class.")
    image_column_name: str | None = option("Column of the images (found if not given).")
    label_column_name: str | None = option("Column of the labels (found if not given).")
    eval_split: str | None = option("Split to evaluate on (validation, else test).")
    train_val_split: float | None = option("Share of train to evaluate on where there is no other split (none).")
    max_eval_samples: int | None = option("Evaluate on so many images, drawn with --seed.")
    streaming: bool = option("Read the dataset as it is needed, without downloading it first.", False)
    label_mapping: str = option(
        "Evaluating a trained model: its classes must be the dataset's, in order (strict), are looked up by name or "
        "taken by number.",
        "strict",
        choices=list(LABEL_MAPPINGS),
    )

    def __post_init__(self):
        fraction = self.train_val_split
        if fraction is not None and not 0 < fraction < 1:
            raise ValueError(f"--train_val_split must be above 0 and below 1, got {fraction}.")


@dataclass
class DataArguments(EvalDataArguments):
    train_dir: str | None = option("Folder of training images, one subfolder per class.")
    train_split: str = option("Split to train on.", "train")
    eval_split: str | None = option("Split to evaluate on (validation, else test, else a share of train).")
    train_val_split: float = option("Share of train to evaluate on where there is no other split.", 0.1)
    max_train_samples: int | None = option("Train on so many images, drawn with --seed.")
    image_cache_gib: float = option("Keep a split decoded in memory if it takes at most so many GiB (0: never).", 1.0)
    shuffle_buffer: int = option("With --streaming: undecoded images of a process that are shuffled at a time.", 5000)


@dataclass
class AugmentationArguments:
    _argument_group_name = "augmentation of training images"

    crop_scale: list[float] = field(
        default_factory=lambda: [0.08, 1.0], metadata={"help": "Area of the random crop, least and largest share."}
    )
    crop_ratio: list[float] = field(
        default_factory=lambda: [3 / 4, 4 / 3],
        metadata={"help": "Width to height of the random crop, least and largest."},
    )
    hflip: float = option("Probability of a horizontal flip.", 0.5)
    color_jitter: float | None = option("Strength of colour jitter.")
    auto_augment: str | None = option("RandAugment or AutoAugment policy of timm: rand-m9-mstd0.5-inc1, ...")
    random_erasing: float = option("Probability of random erasing.", 0.0)
    erasing_mode: str = option("What is put there: pixel (noise), rand (a colour) or const (zero).", "pixel")


class Options(NamedTuple):
    """What a command line and its recipe say; of TokenMixup's settings those that were given."""

    model: ModelArguments
    data: DataArguments
    augmentation: AugmentationArguments
    training: TokenMixupTrainingArguments
    recipe: str | None
    lora: LoraArguments
    tokenmixup: dict[str, Any]


def optional_float(text: str) -> float | None:
    try:
        return None if text.lower() == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number or none expected, got {text!r}") from None


def optional_int(text: str) -> int | None:
    try:
        return None if text.lower() == "none" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a whole number or none expected, got {text!r}") from None


def truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false expected, got {text!r}")
    return text.lower() == "true"


def build_parser(description: str) -> HfArgumentParser:
    """The parser of all options; settings of TokenMixup that are not given leave no trace in what it returns."""
    own = HfArgumentParser([ModelArguments, DataArguments, AugmentationArguments, LoraArguments], add_help=False)
    own.add_argument("--recipe", help=RECIPE_HELP)
    group = own.add_argument_group("TokenMixup", "What is not given stays as the model's configuration has it.")
    for setting in dataclasses.fields(TokenMixupConfigMixin):
        default = getattr(TokenMixupConfigMixin(), setting.name)
        kwargs = {"type": type(default), "default": argparse.SUPPRESS, "choices": setting.metadata.get("choices")}
        if isinstance(default, list):
            kwargs |= {"type": int, "nargs": "*", "metavar": "LAYER"}
        elif isinstance(default, bool):
            kwargs |= {"type": truth, "nargs": "?", "const": True, "metavar": "BOOL"}
        elif setting.type in ("float | None", float | None):
            kwargs["type"] = optional_float
        elif setting.type in ("int | None", int | None):
            kwargs["type"] = optional_int
        flags = dict.fromkeys((f"--{setting.name}", f"--{setting.name.replace('_', '-')}"))
        group.add_argument(*flags, help=f"{setting.metadata['help']} (new models: {default})", **kwargs)
    parser = HfArgumentParser(
        TokenMixupTrainingArguments,
        parents=[own],
        usage="%(prog)s [--recipe RECIPE] [options]",
        description=description,
        formatter_class=ShortHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help="Show the options that matter most.")
    parser.add_argument(
        "--help_all", action=FullHelpAction, help="Show all options, those of transformers' TrainingArguments too."
    )
    return parser


class ShortHelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One line of help, as a rule, for each option, and none for transformers' less usual ones."""

    every_option = False

    def add_argument(self, action: argparse.Action) -> None:
        usual = action.dest in SHOWN_TRAINING_OPTIONS.split() or action.dest not in TRANSFORMERS_OPTIONS
        if (usual or self.every_option) and not any(name.startswith("--no_") for name in action.option_strings):
            super().add_argument(action)

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str):
        if action.choices is not None and len(action.choices) > 6:
            return lambda size: ("NAME",) * size
        return super()._metavar_formatter(action, default_metavar)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        value = (
            ""
            if action.nargs in (0, "?")
            else " "
            + self._format_args(action, action.type.__name__.upper() if isinstance(action.type, type) else "VALUE")
        )
        return ", ".join(name for name in action.option_strings if "-" not in name[2:]) + value


class FullHelpAction(argparse.Action):
    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        parser.formatter_class = type("FullHelp", (ShortHelpFormatter,), {"every_option": True})
        parser.print_help()
        parser.exit()


def _with_newer_names(arguments: Sequence[str]) -> list[str]:
    """A command line with one name for each setting of checkpointing, so that the last word of either name counts."""
    renamed = []
    for word in arguments:
        name, equals, value = word.partition("=")
        newer = CHECKPOINTING_NAMES.get(name.removeprefix("--").replace("-", "_")) if name.startswith("--") else None
        renamed.append(f"--{newer}{equals}{value}" if newer else word)
    return renamed


def parse_options(arguments: Sequence[str], recipes: Path, description: str = "") -> Options:
    """Parse a command line, with the options of its recipe in front.

    Args:
        arguments: as typed.
        recipes: folder of the recipes that are given by name.
        description: what ``--help`` says first.

    Raises:
        ValueError: for an option or a recipe's key that does not exist, with the nearest one that does, and for a
            value that cannot be used here, with the recipe if that sets it.
    """
    parser = build_parser(description)
    expanded = _with_newer_names(expand_recipe(arguments, parser, recipes))
    refuse_removed_values(expanded, parser)
    try:
        training, namespace, remaining = parser.parse_args_into_dataclasses(
            expanded, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        raise ValueError(f"{error}{keys_of_recipe(str(error), arguments, recipes)}") from error
    check_unknown_options(remaining, parser)
    given = vars(namespace)
    groups = (ModelArguments, DataArguments, AugmentationArguments, LoraArguments)
    model, data, augmentation, lora = (
        group(**{item.name: given.pop(item.name) for item in dataclasses.fields(group)}) for group in groups
    )
    recipe = given.pop("recipe")
    return Options(model, data, augmentation, training, recipe, lora, tokenmixup=given)
