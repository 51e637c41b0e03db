#!/usr/bin/env python
"""Train or fine-tune an image classifier with TokenMixup.

  accelerate launch scripts/finetune.py --recipe digits-quickstart
  accelerate launch scripts/finetune.py --model_name_or_path google/vit-base-patch16-224 --ignore_mismatched_sizes \\
      --dataset_name uoft-cs/cifar100 --do_train --do_eval --horizontal_layers 3 --vertical_layers 4 \\
      --output_dir outputs/cifar100
  accelerate launch scripts/finetune.py --model_name_or_path outputs/cifar100 --dataset_name uoft-cs/cifar100 --do_eval

A recipe is a YAML file of these options (by name from scripts/recipes, or by path); flags override it.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoImageProcessor, HfArgumentParser, PreTrainedModel, ViTImageProcessor, set_seed

from hf_tokenmixup.configuration import TokenMixupSettings
from hf_tokenmixup.data import ImageClassificationData, ImageData, build_transforms, collate, load_image_dataset
from hf_tokenmixup.metrics import compute_metrics, top_classes
from hf_tokenmixup.models import load_classifier
from hf_tokenmixup.training import (
    CurvesCallback,
    JsonLinesCallback,
    TokenMixupTrainer,
    TokenMixupTrainingArguments,
    expand_recipe,
    refuse_unknown_options,
)

RECIPES = Path(__file__).parent / "recipes"
logger = logging.getLogger("finetune")


def option(help: str, default: Any = None, **metadata) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model_name_or_path: str | None = option(
        "Model on the Hub or folder: any image classifier; TokenMixup needs a ViT."
    )
    from_scratch: bool = option("Take the model's configuration alone, with fresh weights.", False)
    model_type: str | None = option("With --from_scratch and no model name: the type of model, such as vit.")
    config_overrides: str | None = option('Attributes of the model configuration as JSON: {"hidden_size": 96}.')
    ignore_mismatched_sizes: bool = option("Start a fresh classifier if the number of classes differs.", False)
    attn_implementation: str | None = option("Attention: sdpa, eager, flash_attention_2, ... (transformers' choice).")
    image_processor_name: str | None = option("Image processor, if it is not the model's.")
    image_mean: list[float] | None = option("Normalisation mean per channel, if not the image processor's.")
    image_std: list[float] | None = option("Normalisation deviation per channel, if not the image processor's.")
    model_revision: str | None = option("Branch, tag or commit of the model on the Hub.")
    token: str | None = option("Token for the Hub, if not the one of `hf auth login`.")
    cache_dir: str | None = option("Where downloads are kept.")


@dataclass
class DataArguments:
    _argument_group_name = "data"

    dataset_name: str | None = option("Dataset on the Hub, folder of parquet files, or digits (embedded).")
    dataset_config_name: str | None = option("Configuration of the dataset.")
    train_dir: str | None = option("Folder of training images, one subfolder per class.")
    validation_dir: str | None = option("Folder of evaluation images, one subfolder per class.")
    image_column_name: str | None = option("Column of the images (found if not given).")
    label_column_name: str | None = option("Column of the labels (found if not given).")
    train_split: str = option("Split to train on.", "train")
    eval_split: str | None = option("Split to evaluate on (validation, else test, else a share of train).")
    train_val_split: float = option("Share of train to evaluate on where there is no other split.", 0.1)
    max_train_samples: int | None = option("Train on so many images, drawn with --seed.")
    max_eval_samples: int | None = option("Evaluate on so many images, drawn with --seed.")


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


def number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false expected, got {text!r}")
    return text.lower() == "true"


def build_parser() -> HfArgumentParser:
    own = HfArgumentParser([ModelArguments, DataArguments, AugmentationArguments], add_help=False)
    own.add_argument("--recipe", help="Recipe by name (see scripts/recipes) or path; other flags override it.")
    group = own.add_argument_group("TokenMixup", "What is not given stays as the model's configuration has it.")
    for setting in dataclasses.fields(TokenMixupSettings):
        default = getattr(TokenMixupSettings(), setting.name)
        kwargs = {"type": type(default), "default": argparse.SUPPRESS, "choices": setting.metadata.get("choices")}
        if isinstance(default, list):
            kwargs |= {"type": int, "nargs": "*", "metavar": "LAYER"}
        elif isinstance(default, bool):
            kwargs |= {"type": truth, "nargs": "?", "const": True, "metavar": "BOOL"}
        elif setting.name == "horizontal_tau":
            kwargs["type"] = number_or_none
        group.add_argument(f"--{setting.name}", help=f"{setting.metadata['help']} (new models: {default})", **kwargs)
    return HfArgumentParser(
        TokenMixupTrainingArguments,
        parents=[own],
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse(arguments: list[str]):
    """All arguments as dataclasses, and the given settings of TokenMixup as a dictionary."""
    parser = build_parser()
    arguments = expand_recipe(arguments, parser, RECIPES)
    training, namespace, remaining = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    refuse_unknown_options(remaining, parser)
    given = vars(namespace)
    groups = (ModelArguments, DataArguments, AugmentationArguments)
    parsed = [group(**{item.name: given.pop(item.name) for item in dataclasses.fields(group)}) for group in groups]
    del given["recipe"]
    return *parsed, training, given


def load_image_processor(args: ModelArguments, model: PreTrainedModel):
    """The model's image processor; for a model from nothing, a plain one of the model's image size."""
    name = args.image_processor_name or args.model_name_or_path
    if name is not None:
        processor = AutoImageProcessor.from_pretrained(name, **hub_options(args))
    else:
        size = model.config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        processor = ViTImageProcessor(size={"height": height, "width": width})
    for key in ("image_mean", "image_std"):
        if getattr(args, key) is not None:
            setattr(processor, key, getattr(args, key))
    return processor


def hub_options(args: ModelArguments) -> dict[str, Any]:
    options = {"revision": args.model_revision, "token": args.token, "cache_dir": args.cache_dir}
    return {key: value for key, value in options.items() if value is not None}


def images(dataset: Dataset, split: str, transform: Callable, data: ImageData, seed: int | None) -> Any:
    return ImageClassificationData(
        dataset, transform, image_column=data.image_column, label_column=data.label_column, split=split, seed=seed
    )


def checkpoint_to_resume(args: TokenMixupTrainingArguments) -> str | bool | None:
    """The path as given; for ``last`` (or ``true``) the newest checkpoint of the output folder."""
    given = args.resume_from_checkpoint
    return True if given is not None and given.lower() in ("last", "true") else given


def report(metrics: dict[str, float], trainer: TokenMixupTrainer) -> None:
    """Print what came out, and where it lies."""
    folder = Path(trainer.args.output_dir)
    lines = []
    if "eval_top1" in metrics:
        lines.append(f"top-1 {metrics['eval_top1']:.2%}   top-5 {metrics['eval_top5']:.2%}")
    if trainer.args.do_train:
        lines.append(f"model    {folder}")
    names = ("all_results.json", JsonLinesCallback.file_name, CurvesCallback.file_name)
    for what, name in zip(("metrics", "log", "curves"), names, strict=True):
        if (folder / name).exists():
            lines.append(f"{what:8} {folder / name}")
    print("\n" + "\n".join(lines))


def main(arguments: list[str]) -> None:
    model_args, data_args, augmentation, args, tokenmixup = parse(arguments)
    if not (args.do_train or args.do_eval):
        raise ValueError("Nothing to do: give --do_train, --do_eval or both (a recipe may do so).")
    logging.basicConfig(format="%(message)s", level=logging.INFO if args.should_log else logging.ERROR)
    set_seed(args.seed)

    with args.main_process_first(desc="loading the dataset"):
        data = load_image_dataset(
            dataset_name=data_args.dataset_name,
            dataset_config_name=data_args.dataset_config_name,
            train_dir=data_args.train_dir,
            validation_dir=data_args.validation_dir,
            image_column_name=data_args.image_column_name,
            label_column_name=data_args.label_column_name,
            train_split=data_args.train_split,
            eval_split=data_args.eval_split,
            validation_fraction=data_args.train_val_split,
            max_train_samples=data_args.max_train_samples,
            max_eval_samples=data_args.max_eval_samples,
            seed=args.seed,
            cache_dir=model_args.cache_dir,
            token=model_args.token,
            do_train=args.do_train,
            do_eval=args.do_eval,
        )
    overrides = json.loads(model_args.config_overrides) if model_args.config_overrides else {}
    model = load_classifier(
        model_args.model_name_or_path,
        model_type=model_args.model_type,
        from_scratch=model_args.from_scratch,
        label_names=data.label_names if args.do_train else None,
        tokenmixup=tokenmixup,
        config_overrides=overrides,
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        attn_implementation=model_args.attn_implementation,
        **hub_options(model_args),
    )
    if model.config.num_labels != len(data.label_names):
        raise ValueError(
            f"The model knows {model.config.num_labels} classes and the dataset has {len(data.label_names)}: "
            "evaluate a model that was trained on these classes, or name another --label_column_name."
        )
    processor = load_image_processor(model_args, model)
    train_transform, eval_transform = build_transforms(processor, **dataclasses.asdict(augmentation))
    trainer = TokenMixupTrainer(
        model=model,
        args=args,
        train_dataset=images(data.train, data.train_split, train_transform, data, args.seed)
        if args.do_train
        else None,
        eval_dataset=images(data.evaluation, data.eval_split, eval_transform, data, None) if args.do_eval else None,
        data_collator=collate,
        processing_class=processor,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=top_classes,
        callbacks=[JsonLinesCallback(), CurvesCallback()] if args.do_train else None,
    )
    metrics = {}
    if args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint_to_resume(args))
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
        metrics |= result.metrics
    if args.do_eval:
        evaluated = trainer.evaluate()
        trainer.save_metrics("eval", evaluated)
        metrics |= evaluated
    if args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        report(metrics, trainer)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        if os.environ.get("TOKENMIXUP_TRACEBACK"):
            raise
        sys.exit(f"finetune.py: {error}")
