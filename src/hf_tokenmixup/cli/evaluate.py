"""Evaluate an image classifier: top-1, top-5, loss, images per second, parameters and MACs.

  python scripts/evaluate.py outputs/cifar100 --dataset_name uoft-cs/cifar100
  accelerate launch --num_processes 4 scripts/evaluate.py google/vit-base-patch16-224 \\
      --dataset_name ILSVRC/imagenet-1k --label_mapping number --dtype bf16 --num_workers 8 --json vit.json
  python scripts/evaluate.py outputs/cifar100 --dataset_name uoft-cs/cifar100 --update_card

Any image classifier of transformers, by its name on the Hub or its folder. Every image counts exactly once, however
many processes share the work.
"""

import dataclasses
import json
import logging
import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import HfArgumentParser, PreTrainedModel
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
from ..evaluation.evaluate import EvaluationResult, evaluate_classifier, resolve_model_revision
from ..evaluation.flops import count_macs, count_parameters
from ..hub import update_model_card
from ..hub.eval_results import validate_card
from ..models import class_names, load_classifier, load_config_dict, validate_evaluated_task
from ..training.peers import watch_peers
from ..utils.environment import describe_hardware, describe_precision, library_versions, public_dataset, redact_command
from .arguments import EvalDataArguments, ShortHelpFormatter
from .processors import open_image_processor
from .program import check_output_file, invocation, run_command
from .recipes import check_unknown_options
from .threads import use_physical_cores

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Parser(HfArgumentParser):
    """Raises its errors, so that they are told like all others."""

    def error(self, message: str) -> None:
        raise ValueError(message)


def parse_options(arguments: list[str]) -> tuple[EvalDataArguments, Namespace]:
    """The options of the data, and all others.

    Raises:
        ValueError: for options that do not exist, do not parse or do not go together.
    """
    parser = Parser(
        EvalDataArguments,
        usage="%(prog)s MODEL [options]",
        description=__doc__,
        formatter_class=ShortHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", help="Model on the Hub or folder.")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--batch_size", type=int, default=64, help="Images of a batch, in each process.")
    group.add_argument("--num_workers", type=int, default=0, help="Processes that load images, for each process.")
    group.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="Half precision goes by autocast.")
    group.add_argument("--attn_implementation", help="Attention: sdpa, eager, ... (transformers' choice).")
    group.add_argument("--use_cpu", action="store_true", help="Leave the accelerator alone.")
    group.add_argument("--seed", type=int, default=42, help="Draws images (--max_eval_samples, --train_val_split).")
    group.add_argument("--json", metavar="FILE", type=Path, help="Write the result to this file.")
    group.add_argument("--update_card", action="store_true", help="Write the result into the model's card.")
    group = parser.add_argument_group("Hub")
    group.add_argument("--revision", help="Branch, tag or commit of the model on the Hub.")
    group.add_argument("--token", help="Token for the Hub, if not the one of `hf auth login`.")
    group.add_argument("--cache_dir", help="Where downloads are kept.")
    group.add_argument("--trust_remote_code", action="store_true", help="Run the code that comes with the model.")
    data, args, remaining = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    check_unknown_options(remaining, parser)
    check_options(data, args)
    return data, args


def check_options(options: EvalDataArguments, args: Namespace) -> None:
    """Raise a ``ValueError`` for what would fail, or mislead, at the end of a long evaluation."""
    if (options.dataset_name is None) == (options.validation_dir is None):
        raise ValueError(
            "Expected either --dataset_name or --validation_dir, got "
            f"{'both' if options.dataset_name else 'neither'}. '--dataset_name digits' needs no download."
        )
    if args.batch_size < 1 or args.num_workers < 0:
        raise ValueError(
            f"--batch_size must be at least 1 and --num_workers at least 0, got {args.batch_size} and "
            f"{args.num_workers}."
        )
    local = Path(args.model).is_dir()
    if local and args.revision is not None:
        raise ValueError(f"--revision is for models on the Hub, and {args.model} is a folder.")
    if args.json is not None:
        check_output_file("--json", args.json)
    if not args.update_card:
        return
    if options.max_eval_samples is not None:
        raise ValueError("A card's result is that of a whole split: leave out --max_eval_samples or --update_card.")
    if local:
        validate_card(Path(args.model))
    else:
        if re.fullmatch("[0-9a-f]{40}", args.revision or ""):
            raise ValueError("--update_card writes to a branch, and --revision names a commit.")
        try:
            HfApi(token=args.token).auth_check(args.model, write=True)
        except HfHubHTTPError as error:
            raise ValueError(
                f"--update_card needs a token that may write to {args.model}: log in with `hf auth login` or give "
                f"--token. ({error})"
            ) from error


def connect(use_cpu: bool) -> PartialState:
    """The processes that a launcher started, connected.

    Raises:
        ValueError: if they cannot be: each would evaluate alone, on all images.
    """
    state = PartialState(
        cpu=use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    )
    launched = os.environ.get("WORLD_SIZE", "1")
    if state.num_processes == 1 and launched not in ("", "1"):
        raise ValueError(f"{launched} processes were started and do not find each other: add --use_cpu.")
    watch_peers()
    return state


def hub_options(args: Namespace) -> dict[str, Any]:
    options = {"revision": args.revision, "token": args.token, "cache_dir": args.cache_dir}
    return {name: value for name, value in options.items() if value is not None}


def load_data(options: EvalDataArguments, args: Namespace) -> ImageDatasetSplits:
    given = dataclasses.asdict(options) | {"cache_dir": args.cache_dir, "token": args.token, "do_train": False}
    del given["label_mapping"]
    share = given.pop("train_val_split")
    if given.pop("streaming"):
        return load_streaming_image_dataset(**given)
    return load_image_dataset(validation_fraction=share, seed=args.seed, **given)


def local_name(name: str) -> str:
    """A folder's own name, so that no path is published; a name on the Hub as it is."""
    return Path(name).resolve().name if Path(name).exists() else name


def dataset_of(options: EvalDataArguments) -> str:
    """What to call the dataset in a result that may be published."""
    if options.dataset_name is not None:
        return public_dataset(options.dataset_name)
    return public_dataset(options.validation_dir, "image folder")


def prepare(
    options: EvalDataArguments, args: Namespace, commit: str | None
) -> tuple[
    PreTrainedModel,
    tuple[int, int, int],
    ImageDatasetSplits,
    ImageClassificationData | ImageClassificationIterableDataset,
]:
    """Everything up to the first batch: the model, its image size, the data, and the data as the model reads it.

    Args:
        commit: of a model on the Hub: all its files are those of one commit, whatever happens to the branch.

    Raises:
        ValueError: also where the model's classes are not those of the data.
    """
    hub = hub_options(args) | ({"revision": commit} if commit else {})
    if args.trust_remote_code:
        hub["trust_remote_code"] = True
    model = load_classifier(args.model, plain=True, attn_implementation=args.attn_implementation, **hub)
    processor = open_image_processor(args.model, **hub)
    (height, width), *_ = infer_image_processor_config(processor)
    data = load_data(options, args)
    known = class_names(model.config, args.model)
    images = (ImageClassificationIterableDataset if options.streaming else ImageClassificationData)(
        data.evaluation,
        ImageProcessorTransform(processor),
        image_column=data.image_column,
        label_column=data.label_column,
        split=data.eval_split,
        label_map=build_label_mapping(known, data.label_names, options.label_mapping),
    )
    return model, (3, height, width), data, images


def main(arguments: list[str]) -> None:
    options, args = parse_options(arguments)
    state = connect(args.use_cpu)
    logging.basicConfig(format="%(message)s", level=logging.WARNING if state.is_main_process else logging.ERROR)
    use_physical_cores(state.device)
    if not state.is_main_process:
        disable_progress_bar()
    validate_evaluated_task(load_config_dict(args.model, **hub_options(args)), args.model)
    revision = resolve_model_revision(args.model, **hub_options(args))
    model, image_size, data, images = prepare(options, args, None if Path(args.model).is_dir() else revision)
    model.to(state.device)
    macs = count_macs(model, image_size)
    counts = evaluate_classifier(
        model,
        images,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        dtype=DTYPES[args.dtype],
        state=state,
        progress=state.is_main_process,
    )
    if state.is_main_process:
        evaluation = EvaluationResult(
            model=local_name(args.model),
            model_revision=revision,
            num_parameters=count_parameters(model),
            macs=macs,
            dataset=dataset_of(options),
            dataset_config=options.dataset_config_name,
            dataset_revision=data.revision,
            dataset_fingerprint=data.eval_fingerprint,
            split=data.eval_split,
            num_images=counts.num_images,
            top1=counts.top1 / counts.num_images,
            top5=counts.top5 / counts.num_images,
            loss=counts.loss / counts.num_images,
            images_per_second=counts.num_images / counts.seconds,
            batch_size=args.batch_size,
            num_processes=state.num_processes,
            hardware=describe_hardware(state.num_processes, state.device),
            dtype=describe_precision(args.dtype, model.dtype, state.device),
            command=command(arguments, state.num_processes),
            versions=library_versions(),
        )
        report(evaluation, args)
    state.destroy_process_group()


def command(arguments: list[str], num_processes: int) -> str:
    """What gives the same result; the card is its owner's matter."""
    program = "python" if num_processes == 1 else f"torchrun --nproc_per_node {num_processes}"
    return redact_command(
        f"{program} {invocation('evaluate')}", [word for word in arguments if word != "--update_card"]
    )


def report(evaluation: EvaluationResult, args: Namespace) -> None:
    """Print the result, write it, publish it."""
    print(evaluation.table())
    if args.json is not None:
        args.json.write_text(json.dumps(dataclasses.asdict(evaluation), indent=2) + "\n", encoding="utf-8")
        print(f"json        {args.json}")
    if args.update_card:
        print(f"card        {update_model_card(args.model, evaluation, token=args.token, revision=args.revision)}")


def entry_point() -> None:
    # The bases include the HTTP client's own error, whichever client is installed.
    run_command(main, (ImportError, ValueError, *HfHubHTTPError.__bases__))


if __name__ == "__main__":
    entry_point()
