"""Checks of the options of finetune.py, and of the model and its image processor."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.transforms import infer_image_processor_config
from ..evaluation.flops import use_eager_attention
from ..hub.upload import validate_license
from ..models import border_hint, get_family_config, get_image_size
from ..saliency import eval_mode
from ..training import TokenMixupTrainingArguments
from ..training.checkpointing.disk_space import check_writable
from ..training.checkpointing.resuming import check_no_existing_checkpoints, resolve_resume_checkpoint
from ..training.processes import on_all_processes
from .arguments import DataArguments, ModelArguments, ParsedArguments
from .optimizer_checks import validate_optimizer_args

logger = logging.getLogger(__name__)

METRICS = ("top1", "top5", "loss")


def validate_options(options: ParsedArguments) -> None:
    """Check the options that depend on each other only, before any file is created.

    Raises:
        ValueError: An option has no effect or cannot be used with another one, or no work is requested.
    """
    args, model_args = options.training, options.model
    if args.do_predict:
        raise ValueError(
            "--do_predict has no effect: this script trains and evaluates. To measure a model, pass --do_eval and "
            "--eval_split; to predict, open the output folder with pipeline('image-classification')."
        )
    if args.label_names not in (None, ["labels"]):
        raise ValueError(f"--label_names must be labels, got {' '.join(args.label_names)}. Omit it.")
    if options.dry_run and not args.do_train:
        raise ValueError("--dry_run forecasts a training run, but --do_train is off. Add --do_train.")
    if not (args.do_train or args.do_eval):
        raise ValueError("Nothing to do: pass --do_train, --do_eval or both, or a recipe that has them.")
    if model_args.from_scratch and not args.do_train:
        raise ValueError(
            "--do_eval without --do_train measures trained weights, and --from_scratch gives random ones. Omit "
            "--from_scratch, or add --do_train."
        )


def validate_run(options: ParsedArguments) -> None:
    """Check output folder, license, checkpoints, and the options of LoRA, the optimizer and the best model.

    The path of the checkpoint replaces `resume_from_checkpoint`.

    Raises:
        ValueError: One of them is invalid.
    """
    model_args, args = options.model, options.training
    on_all_processes(lambda: check_writable(args.output_dir))
    if model_args.license is not None:
        validate_license(model_args.license, on_hub=args.push_to_hub, token=args.hub_token)
    if options.lora.lora_rank:
        validate_lora_args(model_args, args)
    if args.resume_from_checkpoint is not None:
        args.resume_from_checkpoint = resolve_resume_checkpoint(args.resume_from_checkpoint, args.output_dir)
    elif args.do_train:
        on_all_processes(lambda: check_no_existing_checkpoints(args.output_dir))
    if args.do_train:
        validate_output_dir(args.output_dir, options.data)
    if model_args.model_revision is not None and Path(model_args.model_name_or_path or ".").is_dir():
        problem = "no model was named" if model_args.model_name_or_path is None else "this is a folder"
        raise ValueError(f"--model_revision is for models on the Hub, and {problem}. Omit it.")
    if args.do_train:
        validate_optimizer_args(args)
    validate_best_model_args(args)


def validate_lora_args(model_args: ModelArguments, args: TokenMixupTrainingArguments) -> None:
    """Check that LoRA has a pretrained model, and that the run does not overwrite it.

    Raises:
        ValueError: The weights are initialized randomly, or the output folder is that of the model.
    """
    name = model_args.model_name_or_path
    if model_args.from_scratch:
        raise ValueError("--lora_rank adapts a pretrained model. Remove --from_scratch, or --lora_rank.")
    if args.do_train and name is not None and Path(name).resolve() == Path(args.output_dir).resolve():
        raise ValueError(
            f"With --lora_rank, checkpoints contain only the adapters and need the unchanged model in {name}. Pass "
            "another --output_dir."
        )


def validate_output_dir(output_dir: str, data_args: DataArguments) -> None:
    """Check that the output folder is outside of the data, so that the next run does not read it as data.

    Raises:
        ValueError: The output folder is a folder of the dataset, or inside of one.
    """
    output = Path(output_dir).resolve()
    for name in ("train_dir", "validation_dir", "dataset_name"):
        folder = getattr(data_args, name)
        if folder and folder != "digits" and Path(folder).is_dir() and output.is_relative_to(Path(folder).resolve()):
            raise ValueError(
                f"--output_dir {output_dir} is inside the data, --{name} {folder}. Name a folder outside of it."
            )


def validate_best_model_args(args: TokenMixupTrainingArguments) -> None:
    """Check the metric of the best model, and its direction.

    Raises:
        ValueError: The metric does not exist, or the worst model would be selected.
    """
    metric = args.metric_for_best_model
    if metric is None:
        return
    if args.greater_is_better is not None and args.greater_is_better == metric.endswith("loss"):
        raise ValueError(
            f"--greater_is_better is {args.greater_is_better} with --metric_for_best_model {metric}, which would "
            "choose the worst model. Omit it."
        )
    if metric.removeprefix("eval_") not in METRICS:
        raise ValueError(f"--metric_for_best_model must be one of {', '.join(METRICS)}, got {metric!r}.")


def warn_of_unused_options(args: TokenMixupTrainingArguments) -> None:
    """Log a warning for each option that has no effect without another one."""
    if args.eval_steps is not None and args.eval_strategy == "no":
        logger.warning("--eval_steps has no effect without --eval_strategy steps.")
    if args.hub_model_id is not None and not args.push_to_hub:
        logger.warning("--hub_model_id has no effect without --push_to_hub: nothing is uploaded.")


def validate_normalization(name: str, values: Sequence[float] | None) -> None:
    """Check the mean or the standard deviation of the channels.

    Args:
        name: `image_mean` or `image_std`.
        values: Three numbers, or one for all channels. None is valid.

    Raises:
        ValueError: A number is not finite, a standard deviation is not positive, or their number is wrong.
    """
    if values is None:
        return
    positive = name == "image_std"
    is_valid = all(math.isfinite(value) and (value > 0 or not positive) for value in values)
    if not is_valid or len(values) not in (1, 3):
        numbers = "numbers above 0" if positive else "finite numbers"
        raise ValueError(f"--{name} must be three {numbers}, or one for all channels, got {values}.")


def validate_normalization_in_force(
    processor: BaseImageProcessor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> None:
    """Check that an image processor normalizes by the values that were given.

    Raises:
        ValueError: It ignores them, as that of timm models does.
    """
    if mean is None and std is None:
        return
    _, found_mean, found_std = infer_image_processor_config(processor)
    for name, given, found in (("image_mean", mean, found_mean), ("image_std", std, found_std)):
        expected = None if given is None else [*given] * (3 if len(given) == 1 else 1)
        if expected is not None and not np.allclose(expected, found, atol=1e-4):
            raise ValueError(
                f"--{name} {' '.join(map(str, given))} has no effect on a {type(processor).__name__}, which uses "
                f"{', '.join(f'{value:.4g}' for value in found)}. Remove it, or pass another image processor by "
                "--image_processor_name."
            )


def validate_image_size(model: PreTrainedModel, height: int, width: int) -> None:
    """Check with a forward pass of one image that the model accepts the images of the image processor.

    Args:
        model: Image classifier.
        height: Height of the images in pixels.
        width: Width of the images in pixels.

    Raises:
        ValueError: The forward pass fails.
    """
    size = get_image_size(model.config) or (height, width)
    image = torch.zeros(1, 3, height, width, device=model.device, dtype=model.dtype)
    try:
        # Other implementations of attention may not support a CPU.
        with eval_mode(model), use_eager_attention(model), torch.no_grad():
            model(pixel_values=image)
    except (RuntimeError, ValueError, LookupError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(_image_size_message(model, (height, width), size, reason)) from error
    family_config = get_family_config(model.config)
    if family_config and size != (height, width) and (hint := border_hint(family_config, (height, width))):
        logger.warning(hint)


def _image_size_message(
    model: PreTrainedModel, processed: tuple[int, int], configured: tuple[int, int], reason: str
) -> str:
    if processed == configured:
        return (
            f"{type(model).__name__} cannot read images of shape (channels, height, width) = {(3, *processed)}, as "
            f"the image processor makes them: {reason} Pass an image processor, an image_size and a patch_size that "
            "belong together."
        )
    sizes = {}
    for height, width in (processed, configured):
        sizes[f"{height}x{width}"] = f"--image_size {height}" + (f" {width}" if height != width else "")
    (made, made_flag), (expected, expected_flag) = sizes.items()
    return (
        f"The image processor makes images of {made} pixels, and the model is for {expected}. Pass {made_flag} to set "
        f"the model to {made} (its learned positions are interpolated), or {expected_flag} to set the image processor "
        f"to {expected}. ({reason})"
    )
