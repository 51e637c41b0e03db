"""Train or fine-tune an image classifier with TokenMixup.

  accelerate launch scripts/finetune.py --recipe digits-quickstart
  accelerate launch scripts/finetune.py --model_name_or_path google/vit-base-patch16-224 --ignore_mismatched_sizes \\
      --dataset_name uoft-cs/cifar100 --do_train --do_eval --horizontal_layers 3 --vertical_layers 4 \\
      --output_dir outputs/cifar100
  accelerate launch scripts/finetune.py --model_name_or_path outputs/cifar100 --dataset_name uoft-cs/cifar100 --do_eval

A recipe is a YAML file of these options (by name from hf_tokenmixup's recipes, or by path); flags override it.
--print_recipe RECIPE prints one with all of its options.
"""

import atexit
import dataclasses
import logging
import math
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import BaseImageProcessor, PreTrainedModel, ViTImageProcessor, set_seed

from ..data import (
    ImageClassificationData,
    ImageClassificationIterableDataset,
    ImageDatasetSplits,
    build_label_mapping,
    build_transforms,
    collate,
    load_image_dataset,
    load_streaming_image_dataset,
)
from ..data.transforms import infer_image_processor_config, resize_image_processor
from ..evaluation.flops import use_eager_attention
from ..hub.model_card import TrainingCardData
from ..hub.upload import HubUploadError, validate_license
from ..metrics import compute_metrics, top_classes
from ..models import FAMILIES, border_hint, class_names, height_and_width, load_classifier
from ..saliency import eval_mode
from ..training import (
    JsonlLoggerCallback,
    NonFiniteLossError,
    SaveError,
    TokenMixupTrainer,
    TokenMixupTrainingArguments,
    TrainingCurvesCallback,
)
from ..training.checkpointing.disk_space import check_writable
from ..training.checkpointing.integrity import (
    check_no_existing_checkpoints,
    get_last_complete_checkpoint,
    resolve_resume_checkpoint,
)
from ..training.effective_settings import mixed_precision
from ..training.mixing_summary import describe_mixing
from ..training.processes import check_equal, on_all_processes
from ..utils.environment import public_dataset, redact_command
from .arguments import DataArguments, ModelArguments, ParsedArguments, build_parser, format_recipe, parse_options
from .launch_command import launch_command
from .optimizer_checks import validate_optimizer_args
from .parser import flags_by_parameter
from .processors import open_image_processor
from .program import exit_with, invocation, out_of_memory_message, program_name, worker_error
from .recipes import take_option
from .threads import use_physical_cores

logger = logging.getLogger(__name__)

METRICS = ("top1", "top5", "loss")
LOADING_OPTIONS = (
    "dataset_name",
    "dataset_config_name",
    "train_dir",
    "validation_dir",
    "image_column_name",
    "label_column_name",
    "train_split",
    "eval_split",
    "max_train_samples",
    "max_eval_samples",
)
# Options of evaluate.py that repeat an evaluation of finetune.py.
EVALUATION_OPTIONS = (
    "dataset_name",
    "dataset_config_name",
    "validation_dir",
    "label_column_name",
    "eval_split",
    "max_eval_samples",
)


def load_image_processor(args: ModelArguments, model: PreTrainedModel) -> BaseImageProcessor:
    """The model's image processor, with the size, mean and standard deviation that were given.

    A model without a name gets a `ViTImageProcessor` of its image size.

    Raises:
        ValueError: A number is not possible, or the size of the image processor cannot be changed.
    """
    _validate_normalization("image_mean", args.image_mean)
    _validate_normalization("image_std", args.image_std)
    name = args.image_processor_name or args.model_name_or_path
    size = parse_image_size(args)
    if name is None:
        height, width = height_and_width(size or getattr(model.config, "image_size", 224))
        processor = ViTImageProcessor(size={"height": height, "width": width})
    else:
        try:
            processor = open_image_processor(name, **args.hub_kwargs())
        except ValueError as error:
            raise ValueError(f"{error} --image_processor_name selects another one than the model's.") from error
        if size is not None:
            resize_image_processor(processor, *height_and_width(size))
    for key in ("image_mean", "image_std"):
        if getattr(args, key) is not None:
            setattr(processor, key, getattr(args, key))
    return processor


def _validate_normalization(name: str, values: Sequence[float] | None) -> None:
    if values is None:
        return
    positive = name == "image_std"
    possible = all(math.isfinite(value) and (value > 0 or not positive) for value in values)
    if not possible or len(values) not in (1, 3):
        numbers = "numbers above 0" if positive else "finite numbers"
        raise ValueError(f"--{name} must be three {numbers}, or one for all channels, got {values}.")


def parse_image_size(args: ModelArguments) -> int | list[int] | None:
    """`--image_size` as in a configuration: one number, or height and width; None if it is not given.

    Raises:
        ValueError: There are more than two numbers, or one is below 1.
    """
    size = args.image_size
    if size is None:
        return None
    if len(size) not in (1, 2) or min(size) < 1:
        raise ValueError(
            f"--image_size must be a side, or height and width, of at least 1 pixel, got {' '.join(map(str, size))}."
        )
    return size[0] if len(size) == 1 else list(size)


def validate_image_size(model: PreTrainedModel, height: int, width: int) -> None:
    """Check that the model accepts images of the image processor's size, with a forward pass of one image.

    Raises:
        ValueError: It does not.
    """
    size = height_and_width(getattr(model.config, "image_size", None) or (height, width))
    image = torch.zeros(1, 3, height, width, device=model.device, dtype=model.dtype)
    try:
        # Other implementations of attention may not support a CPU.
        with eval_mode(model), use_eager_attention(model), torch.no_grad():
            model(pixel_values=image)
    except (RuntimeError, ValueError, LookupError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(_image_size_message(model, (height, width), size, reason)) from error
    differs = size != (height, width) and model.config.model_type in FAMILIES
    if differs and (hint := border_hint(model.config, (height, width))):
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


def build_train_dataset(
    data: ImageDatasetSplits, transform: Callable, args: DataArguments, seed: int
) -> ImageClassificationData | ImageClassificationIterableDataset:
    kwargs = {"image_column": data.image_column, "label_column": data.label_column, "split": data.train_split}
    if args.streaming:
        kwargs |= {"shuffle_buffer": args.shuffle_buffer, "num_images": data.num_train_examples}
        return ImageClassificationIterableDataset(data.train, transform, seed=seed, **kwargs)
    return ImageClassificationData(data.train, transform, seed=seed, cache_gib=args.image_cache_gib, **kwargs)


def build_eval_dataset(
    data: ImageDatasetSplits, transform: Callable, args: DataArguments, label_map: Sequence[int] | None
) -> ImageClassificationData | ImageClassificationIterableDataset:
    kwargs = {"image_column": data.image_column, "label_column": data.label_column, "split": data.eval_split}
    kwargs |= {"label_map": label_map}
    if args.streaming:
        return ImageClassificationIterableDataset(data.evaluation, transform, **kwargs)
    return ImageClassificationData(data.evaluation, transform, cache_gib=args.image_cache_gib, **kwargs)


def validate_lora_args(model_args: ModelArguments, args: TokenMixupTrainingArguments) -> None:
    """Check that LoRA has a pretrained model, and that the run does not overwrite it.

    Raises:
        ValueError: The weights are initialized, or --output_dir is the model's folder.
    """
    name = model_args.model_name_or_path
    if model_args.from_scratch:
        raise ValueError("--lora_rank adapts a pretrained model. Remove --from_scratch, or --lora_rank.")
    if args.do_train and name is not None and Path(name).resolve() == Path(args.output_dir).resolve():
        raise ValueError(
            f"With --lora_rank, checkpoints contain only the adapters and need the unchanged model in {name}. Pass "
            "another --output_dir."
        )


def print_summary(metrics: dict[str, float], trainer: TokenMixupTrainer) -> None:
    """Print the accuracy, and the paths of the files."""
    folder = Path(trainer.args.output_dir)
    lines = []
    if "eval_top1" in metrics:
        lines.append(f"top-1 {metrics['eval_top1']:.2%}   top-5 {metrics['eval_top5']:.2%}")
    if mixing := describe_mixing(metrics, trainer.classifier_model.config):
        lines.append(f"mixing   {mixing}")
    if trainer.args.do_train:
        lines.append(f"model    {folder}")
    files = {
        "metrics": "all_results.json",
        "log": JsonlLoggerCallback.file_name,
        "curves": TrainingCurvesCallback.file_name,
    }
    for label, name in files.items():
        if (folder / name).exists():
            lines.append(f"{label:8} {folder / name}")
    print("\n" + "\n".join(lines))


def dataset_label(args: DataArguments, folder: str | None) -> str:
    """The dataset's name, or that of the image folder, in a model card."""
    if args.dataset_name is not None:
        return public_dataset(args.dataset_name)
    return public_dataset(folder, "image folder")


def build_card_data(
    options: ParsedArguments, arguments: Sequence[str], data: ImageDatasetSplits, trainer: TokenMixupTrainer
) -> dict[str, Any]:
    """The parts of the model card that the trainer does not know, by the trainer's attribute."""
    model_args, data_args, args = options.model, options.data, options.training
    training = TrainingCardData(
        dataset=dataset_label(data_args, data_args.train_dir or data_args.validation_dir),
        dataset_config=data_args.dataset_config_name,
        license=model_args.license,
        base_model=None if model_args.from_scratch else model_args.model_name_or_path,
        train_split=data.train_split,
        recipe=options.recipe,
        command=redact_command(f"{launch_command(trainer)} {invocation('finetune')}", arguments),
        hyperparameters=dataclasses.asdict(options.augmentation),
    )
    # evaluate.py holds out images of `train` only, so no command would repeat a result on another split.
    if not args.do_eval or (data.eval_is_split_from_train and data_args.train_split != "train"):
        return {"training_card_data": training}
    values = {name: getattr(data_args, name) for name in EVALUATION_OPTIONS}
    words = [f"--{name}={value}" for name, value in values.items() if value is not None]
    if data.eval_is_split_from_train:
        words += [f"--train_val_split={data_args.train_val_split}"]
    if data.eval_is_split_from_train or data_args.max_eval_samples:
        words += [f"--seed={args.seed}"]
    precision = mixed_precision(trainer.accelerator)
    words += [f"--dtype={precision}"] if precision in ("bf16", "fp16") else []
    evaluation = {
        "dataset": dataset_label(data_args, data_args.validation_dir or data_args.train_dir),
        "dataset_config": data_args.dataset_config_name,
        "dataset_revision": data.revision,
        "dataset_fingerprint": data.eval_fingerprint,
        "split": data.eval_split,
        "command": redact_command(f"python {invocation('evaluate')} {{model}}", words),
    }
    return {"training_card_data": training, "eval_card_data": evaluation}


def load_data(
    data_args: DataArguments, model_args: ModelArguments, args: TokenMixupTrainingArguments
) -> ImageDatasetSplits:
    """Load the dataset, and check that all processes have the same one."""
    kwargs = {name: getattr(data_args, name) for name in LOADING_OPTIONS}
    kwargs |= {"cache_dir": model_args.cache_dir, "token": model_args.token}
    kwargs |= {"do_train": args.do_train, "do_eval": args.do_eval}

    def load() -> ImageDatasetSplits:
        if data_args.streaming:
            return load_streaming_image_dataset(**kwargs)
        with args.main_process_first(desc="loading the dataset"):
            return load_image_dataset(validation_fraction=data_args.train_val_split, seed=args.seed, **kwargs)

    data = on_all_processes(load)
    names = ("train_split", "eval_split", "image_column", "label_column", "label_names")
    found = {name: getattr(data, name) for name in names}
    if not data_args.streaming:
        splits = {"images to train": data.train, "images to evaluate": data.evaluation}
        found |= {name: len(split) for name, split in splits.items() if split is not None}
    check_equal("The dataset", found, "Give all processes the same files.")
    return data


def validate_options(options: ParsedArguments) -> None:
    """Check the options that need no other thing than each other, before anything is created.

    Raises:
        ValueError: An option has no effect or cannot be used with another one, or nothing is to be done.
    """
    args, model_args = options.training, options.model
    if args.do_predict:
        raise ValueError(
            "--do_predict has no effect: this script trains and evaluates. To measure a model, pass --do_eval and "
            "--eval_split; to predict, open the output folder with pipeline('image-classification')."
        )
    if args.label_names not in (None, ["labels"]):
        raise ValueError(f"--label_names must be labels, got {' '.join(args.label_names)}. Omit it.")
    if not (args.do_train or args.do_eval):
        raise ValueError("Nothing to do: pass --do_train, --do_eval or both, or a recipe that has them.")
    if model_args.from_scratch and not args.do_train:
        raise ValueError(
            "--do_eval without --do_train measures trained weights, and --from_scratch gives random ones. Omit "
            "--from_scratch, or add --do_train."
        )


def validate_run(options: ParsedArguments) -> None:
    """Check output folder, license, checkpoints, and the options of LoRA, the optimizer and the best model.

    `resume_from_checkpoint` becomes the path of the checkpoint.

    Raises:
        ValueError: One of them cannot be used.
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


def validate_output_dir(output_dir: str, data_args: DataArguments) -> None:
    """Check that the output folder is outside of the data, so that the next run does not read it as data.

    Raises:
        ValueError: It is a folder of the dataset, or inside of one.
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
        ValueError: There is no such metric, or the worst model would be chosen.
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


def load_model(options: ParsedArguments, label_names: list[str]) -> PreTrainedModel:
    """The model of the options, with adapters if LoRA is on."""
    args, model_args = options.training, options.model
    model = load_classifier(
        model_args.model_name_or_path,
        model_type=model_args.model_type,
        from_scratch=model_args.from_scratch,
        plain=not args.do_train,
        label_names=label_names if args.do_train else None,
        tokenmixup=options.tokenmixup,
        config_overrides=model_args.parse_config_overrides(),
        image_size=parse_image_size(model_args),
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        attn_implementation=model_args.attn_implementation,
        **model_args.hub_kwargs(),
    )
    if args.do_train and options.lora.lora_rank:
        model = options.lora.apply(model)
        if args.should_log:
            model.print_trainable_parameters()
    return model


def build_trainer(arguments: Sequence[str]) -> TokenMixupTrainer:
    """Load data and model, and build the trainer of a command line.

    Raises:
        ValueError: An option, the model or the data cannot be used.
    """
    options = parse_options(arguments, __doc__)
    model_args, data_args, args = options.model, options.data, options.training
    validate_options(options)
    if not (args.do_train or args.push_to_hub) and args.output_dir_is_default:
        # The Trainer creates its output folder, and an evaluation saves nothing in it.
        args.output_dir = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, args.output_dir, ignore_errors=True)
    logging.basicConfig(format="%(message)s", level=logging.WARNING if args.should_log else logging.ERROR)
    warn_of_unused_options(args)
    use_physical_cores(args.device)
    set_seed(args.seed)
    validate_run(options)
    data = load_data(data_args, model_args, args)
    model = load_model(options, data.label_names)
    label_map = None
    if not args.do_train:
        model_names = class_names(model.config, str(model_args.model_name_or_path))
        label_map = build_label_mapping(model_names, data.label_names, data_args.label_mapping)
    if args.do_train and args.per_device_train_batch_size == 1 and getattr(model.config, "horizontal_layers", []):
        logger.warning(
            "horizontal_layers have no effect in batches of one image, which has no partner. Pass a larger "
            "--per_device_train_batch_size."
        )
    processor = load_image_processor(model_args, model)
    train_transform, eval_transform = build_transforms(processor, **dataclasses.asdict(options.augmentation))
    (height, width), *_ = infer_image_processor_config(processor)
    validate_image_size(model, height, width)
    train_dataset, eval_dataset = None, None
    if args.do_train:
        train_dataset = build_train_dataset(data, train_transform, data_args, args.seed)
    if args.do_eval:
        eval_dataset = build_eval_dataset(data, eval_transform, data_args, label_map)
    trainer = TokenMixupTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collate,
        processing_class=processor,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=top_classes,
        callbacks=[JsonlLoggerCallback(), TrainingCurvesCallback()] if args.do_train else None,
    )
    # After the trainer is built, since its accelerator has the launcher's settings.
    for name, card_data in build_card_data(options, arguments, data, trainer).items():
        setattr(trainer, name, card_data)
    return trainer


def train_and_evaluate(trainer: TokenMixupTrainer) -> None:
    """Train, evaluate, save and upload, as the trainer's arguments have it.

    Raises:
        SystemExit: SIGTERM ended the run, after a checkpoint was saved.
    """
    args, metrics = trainer.args, {}
    if args.do_train:
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        if trainer.terminated:
            # The status of a program that this signal ends. A cluster allows no time for more.
            sys.exit(128 + signal.SIGTERM)
        if args.load_best_model_at_end and trainer.state.best_model_checkpoint is None:
            logger.warning(
                "--load_best_model_at_end has no effect: no checkpoint was evaluated. The last weights are saved."
            )
        # An external call would also upload, before the model card has its results.
        trainer.save_model(_internal_call=True)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
        metrics |= result.metrics
    if args.do_eval:
        eval_metrics = trainer.evaluate()
        if args.do_train or not args.output_dir_is_default:
            trainer.save_metrics("eval", eval_metrics)
        metrics |= eval_metrics
    if args.do_train:
        trainer.create_model_card()
    if trainer.is_world_process_zero():
        print_summary(metrics, trainer)
    if args.push_to_hub:
        commit = trainer.push_to_hub()
        if commit is not None:
            print(f"on the Hub  {commit.repo_url}")


def print_recipe(arguments: Sequence[str]) -> bool:
    """Print the recipe of `--print_recipe`, overridden by the other arguments; False without this option."""
    recipe, overrides = take_option("print_recipe", arguments)
    if recipe is None:
        return False
    print(format_recipe(recipe, overrides), end="")
    return True


def main(arguments: Sequence[str]) -> None:
    """Train and evaluate, or print the recipe of `--print_recipe`.

    Raises:
        ValueError: An option, the model or the data cannot be used.
        SystemExit: SIGTERM ended the run.
    """
    if not print_recipe(arguments):
        train_and_evaluate(build_trainer(arguments))


def exit_for_memory(error: MemoryError | RuntimeError) -> NoReturn:
    """End the process with one line for an out-of-memory error; raise any other error again."""
    message = out_of_memory_message(error)
    if message is None:
        raise error
    exit_with(
        f"not enough memory ({message}). Pass a lower --per_device_train_batch_size with more "
        "--gradient_accumulation_steps, a lower --per_device_eval_batch_size, fewer --dataloader_num_workers, a "
        "smaller --image_size, or --bf16."
    )


def entry_point() -> None:
    program = program_name()
    try:
        if print_recipe(sys.argv[1:]):
            return
        trainer = build_trainer(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        exit_with(error, flags_by_parameter(build_parser()))
    except (MemoryError, RuntimeError) as error:
        exit_for_memory(error)
    try:
        train_and_evaluate(trainer)
    except KeyboardInterrupt:
        newest = get_last_complete_checkpoint(trainer.args.output_dir)
        found = "no checkpoint was written yet" if newest is None else f"--resume_from_checkpoint last is {newest}"
        print(f"\n{program}: interrupted; {found}.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except HubUploadError as error:
        exit_with(f"the training is complete, but the upload failed. {error}")
    except (MemoryError, RuntimeError) as error:
        exit_for_memory(error)
    except (ValueError, NonFiniteLossError, SaveError) as error:
        in_worker = worker_error(error)
        raised_in = in_worker[0] if in_worker else Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not raised_in.is_relative_to(Path(__file__).parents[1]):
            # Not an error of this package, so its traceback is needed.
            raise
        exit_with(error, flags_by_parameter(build_parser()))


if __name__ == "__main__":
    entry_point()
