"""Evaluate an image classifier: top-1, top-5, loss, calibration error, images per
second, parameters and MACs.

  # a trained model
  python scripts/evaluate.py outputs/cifar100 --dataset_name uoft-cs/cifar100
  # own photographs, one subfolder per class
  python scripts/evaluate.py outputs/mine --validation_dir photos/validation
  # several processes, in bfloat16, with a JSON file
  accelerate launch --num_processes 4 scripts/evaluate.py \\
      google/vit-base-patch16-224 --dataset_name ILSVRC/imagenet-1k \\
      --label_mapping number --dtype bf16 --num_workers 8 --json vit.json
  # corrupted images
  python scripts/evaluate.py outputs/cifar100 --dataset_name uoft-cs/cifar100 \\
      --corruptions gaussian_noise jpeg
  # the result in the model card, of a folder or a repository
  python scripts/evaluate.py outputs/cifar100 --dataset_name uoft-cs/cifar100 \\
      --update_card

The model is any image classifier of transformers, by its name on the Hub or its
folder. Every image counts exactly once on any number of processes. Corruptions
are applied at the size of the model's images, before the normalization. Their
random numbers do not depend on the model, the batch size or the number of
processes.
"""

import dataclasses
import json
import logging
import os
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ..data import (
    ImageClassificationData,
    ImageClassificationIterableDataset,
    ImageDatasetSplits,
    build_label_mapping,
    load_image_dataset,
    load_streaming_image_dataset,
)
from ..data.transforms import ImageProcessorTransform, infer_image_processor_config
from ..evaluation.corruptions import CORRUPTIONS, average_corruptions, validate_corruptions
from ..evaluation.evaluate import (
    EvaluationResult,
    evaluate_classifier,
    evaluate_corruptions,
    resolve_model_revision,
)
from ..evaluation.flops import count_macs, count_parameters
from ..hub import update_model_card
from ..hub.card_metadata import validate_card
from ..models import class_names, load_classifier, load_config_dict, validate_evaluated_task
from ..training.peers import watch_peers
from ..utils.environment import describe_hardware, describe_precision, library_versions, public_dataset, redact_command
from .arguments import EvalDataArguments
from .parser import CliParser, ShortHelpFormatter, add_hub_options, hub_kwargs
from .processors import open_image_processor
from .program import check_output_file, invocation, run_command
from .recipes import check_unknown_options
from .threads import use_physical_cores

DEFAULT_SEVERITY = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_parser() -> CliParser:
    """The parser of the command line."""
    parser = CliParser(
        EvalDataArguments,
        usage="%(prog)s MODEL [options]",
        description=__doc__,
        formatter_class=ShortHelpFormatter,
    )
    parser.add_argument("model", help="Model on the Hub or folder.")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--batch_size", type=int, default=64, help="Images of a batch, in each process.")
    group.add_argument("--num_workers", type=int, default=0, help="Processes that load images, for each process.")
    group.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="bf16 and fp16 use autocast.")
    group.add_argument("--attn_implementation", help="Attention: sdpa, eager, ... (transformers' choice).")
    group.add_argument("--use_cpu", action="store_true", help="Do not use an accelerator.")
    group.add_argument(
        "--seed", type=int, default=42, help="Draws images (--max_eval_samples, --train_val_split) and noise."
    )
    group = parser.add_argument_group("corrupted images")
    group.add_argument(
        "--corruptions",
        nargs="*",
        metavar="NAME",
        help=f"Evaluate on corrupted images too: {', '.join(CORRUPTIONS)}; all of them without a name.",
    )
    group.add_argument(
        "--corruption_severity",
        type=int,
        metavar="N",
        help=f"Severity of the corruptions, 1 to 5 ({DEFAULT_SEVERITY}).",
    )
    group = parser.add_argument_group("result")
    group.add_argument("--json", metavar="FILE", type=Path, help="Write the result to this file.")
    group.add_argument("--update_card", action="store_true", help="Write the result into the model's card.")
    add_hub_options(parser, remote_code=True)
    return parser


def parse_options(arguments: Sequence[str]) -> tuple[EvalDataArguments, Namespace]:
    """The options of the data, and all others.

    Raises:
        ValueError: An option does not exist, has a wrong value, or cannot be used with another one.
    """
    parser = build_parser()
    check_unknown_options(parser.parse_known_args(arguments)[1], parser)
    data_args, args = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    validate_options(data_args, args)
    return data_args, args


def validate_options(data_args: EvalDataArguments, args: Namespace) -> None:
    """Check what would fail, or mislead, at the end of a long evaluation.

    Raises:
        ValueError: An option has a wrong value, or cannot be used with another one.
    """
    if (data_args.dataset_name is None) == (data_args.validation_dir is None):
        raise ValueError(
            "Expected either --dataset_name or --validation_dir, got "
            f"{'both' if data_args.dataset_name else 'neither'}. '--dataset_name digits' needs no download."
        )
    if args.batch_size < 1 or args.num_workers < 0:
        raise ValueError(
            f"--batch_size must be at least 1 and --num_workers at least 0, got {args.batch_size} and "
            f"{args.num_workers}."
        )
    if Path(args.model).is_dir() and args.revision is not None:
        raise ValueError(f"--revision is for models on the Hub, and {args.model} is a folder.")
    if args.corruptions is None and args.corruption_severity is not None:
        raise ValueError("--corruption_severity has no effect without --corruptions.")
    if args.corruptions is not None:
        args.corruptions = args.corruptions or list(CORRUPTIONS)
        args.corruption_severity = DEFAULT_SEVERITY if args.corruption_severity is None else args.corruption_severity
        validate_corruptions(args.corruptions, args.corruption_severity)
    if args.json is not None:
        check_output_file("--json", args.json)
    if args.update_card:
        validate_card_options(data_args, args)


def validate_card_options(data_args: EvalDataArguments, args: Namespace) -> None:
    """Check that the result can be written into the model's card.

    Raises:
        ValueError: It cannot: for a part of a split, at a commit, in a broken card or without permission.
    """
    if data_args.max_eval_samples is not None:
        raise ValueError("A card's result is that of a complete split. Remove --max_eval_samples or --update_card.")
    if Path(args.model).is_dir():
        validate_card(Path(args.model))
        return
    if re.fullmatch("[0-9a-f]{40}", args.revision or ""):
        raise ValueError("--update_card writes to a branch, and --revision names a commit.")
    try:
        HfApi(token=args.token).auth_check(args.model, write=True)
    except HfHubHTTPError as error:
        raise ValueError(
            f"--update_card needs a token that may write to {args.model}. Log in with `hf auth login`, or pass "
            f"--token. ({error})"
        ) from error


def init_distributed(use_cpu: bool) -> PartialState:
    """Connect the processes that a launcher started.

    Raises:
        ValueError: They are not connected: each would evaluate all images on its own.
    """
    state = PartialState(
        cpu=use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    )
    world_size = os.environ.get("WORLD_SIZE", "1")
    if state.num_processes == 1 and world_size not in ("", "1"):
        raise ValueError(f"WORLD_SIZE is {world_size}, but the processes are not connected. Add --use_cpu.")
    watch_peers()
    return state


def load_data(data_args: EvalDataArguments, args: Namespace) -> ImageDatasetSplits:
    kwargs = dataclasses.asdict(data_args) | {"cache_dir": args.cache_dir, "token": args.token, "do_train": False}
    del kwargs["label_mapping"]
    fraction = kwargs.pop("train_val_split")
    if kwargs.pop("streaming"):
        return load_streaming_image_dataset(**kwargs)
    return load_image_dataset(validation_fraction=fraction, seed=args.seed, **kwargs)


def model_label(name: str) -> str:
    """A folder's name without its path, which is not published; a name on the Hub as it is."""
    return Path(name).resolve().name if Path(name).exists() else name


def dataset_label(args: EvalDataArguments) -> str:
    """The dataset's name, or that of the image folder, in a result that may be published."""
    if args.dataset_name is not None:
        return public_dataset(args.dataset_name)
    return public_dataset(args.validation_dir, "image folder")


@dataclass(frozen=True)
class EvaluationSetup:
    """What is evaluated.

    Attributes:
        model: the classifier.
        image_size: (3, H, W) of the model's images.
        data: the dataset.
        images: the split to evaluate, transformed for the model.
        processor: the model's image processor.
    """

    model: PreTrainedModel
    image_size: tuple[int, int, int]
    data: ImageDatasetSplits
    images: ImageClassificationData | ImageClassificationIterableDataset
    processor: BaseImageProcessor


def load_setup(data_args: EvalDataArguments, args: Namespace, commit: str | None) -> EvaluationSetup:
    """Load model and data.

    Args:
        data_args: options of the data.
        args: all other options.
        commit: of a model on the Hub, so that all files are from one commit although the branch may change.

    Raises:
        ValueError: Model or data cannot be used, or the model's classes are not the dataset's.
    """
    kwargs = hub_kwargs(args) | ({"revision": commit} if commit else {})
    if args.trust_remote_code:
        kwargs["trust_remote_code"] = True
    model = load_classifier(args.model, plain=True, attn_implementation=args.attn_implementation, **kwargs)
    processor = open_image_processor(args.model, **kwargs)
    (height, width), *_ = infer_image_processor_config(processor)
    data = load_data(data_args, args)
    model_names = class_names(model.config, args.model)
    dataset_class = ImageClassificationIterableDataset if data_args.streaming else ImageClassificationData
    images = dataset_class(
        data.evaluation,
        ImageProcessorTransform(processor),
        image_column=data.image_column,
        label_column=data.label_column,
        split=data.eval_split,
        label_map=build_label_mapping(model_names, data.label_names, data_args.label_mapping),
    )
    return EvaluationSetup(model, (3, height, width), data, images, processor)


def main(arguments: Sequence[str]) -> None:
    data_args, args = parse_options(arguments)
    state = init_distributed(args.use_cpu)
    logging.basicConfig(format="%(message)s", level=logging.WARNING if state.is_main_process else logging.ERROR)
    use_physical_cores(state.device)
    if not state.is_main_process:
        disable_progress_bar()
    validate_evaluated_task(load_config_dict(args.model, **hub_kwargs(args)), args.model)
    revision = resolve_model_revision(args.model, **hub_kwargs(args))
    setup = load_setup(data_args, args, None if Path(args.model).is_dir() else revision)
    model, data = setup.model.to(state.device), setup.data
    macs = count_macs(model, setup.image_size)
    options = {
        "batch_size": args.batch_size,
        "num_workers": args.num_workers,
        "dtype": DTYPES[args.dtype],
        "state": state,
        "progress": state.is_main_process,
    }
    counts = evaluate_classifier(model, setup.images, **options)
    corruptions = ()
    if args.corruptions:
        options |= {"severity": args.corruption_severity, "seed": args.seed}
        corruptions = evaluate_corruptions(model, setup.images, setup.processor, args.corruptions, **options)
    if state.is_main_process:
        evaluation = EvaluationResult(
            model=model_label(args.model),
            model_revision=revision,
            num_parameters=count_parameters(model),
            macs=macs,
            dataset=dataset_label(data_args),
            dataset_config=data_args.dataset_config_name,
            dataset_revision=data.revision,
            dataset_fingerprint=data.eval_fingerprint,
            split=data.eval_split,
            num_images=counts.num_images,
            top1=counts.top1 / counts.num_images,
            top5=counts.top5 / counts.num_images if model.config.num_labels > 5 else None,
            loss=counts.loss / counts.num_images,
            calibration_error=counts.calibration_error(),
            images_per_second=counts.num_images / counts.seconds,
            batch_size=args.batch_size,
            num_processes=state.num_processes,
            hardware=describe_hardware(state.num_processes, state.device),
            dtype=describe_precision(args.dtype, model.dtype, state.device),
            command=reproduce_command(arguments, state.num_processes),
            versions=library_versions(),
            corruptions=corruptions,
            corruption_mean=average_corruptions(corruptions) if corruptions else None,
        )
        save_result(evaluation, args)
    state.destroy_process_group()


def reproduce_command(arguments: Sequence[str], num_processes: int) -> str:
    """The command that repeats a result, without the update of the card, which needs the owner's token."""
    program = "python" if num_processes == 1 else f"torchrun --nproc_per_node {num_processes}"
    words = [word for word in arguments if word != "--update_card"]
    return redact_command(f"{program} {invocation('evaluate')}", words)


def save_result(evaluation: EvaluationResult, args: Namespace) -> None:
    """Print the result, and write it to the file and the card that the options name."""
    print(evaluation.table())
    if args.json is not None:
        args.json.write_text(json.dumps(dataclasses.asdict(evaluation), indent=2) + "\n", encoding="utf-8")
        print(f"json        {args.json}")
    if args.update_card:
        print(f"card        {update_model_card(args.model, evaluation, token=args.token, revision=args.revision)}")


def entry_point() -> None:
    # The bases include the error of the HTTP client, of which there are several.
    run_command(main, (ImportError, ValueError, *HfHubHTTPError.__bases__), build_parser)


if __name__ == "__main__":
    entry_point()
