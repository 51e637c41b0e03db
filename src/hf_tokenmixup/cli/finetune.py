"""Train or fine-tune an image classifier with TokenMixup.

  # a dataset of the Hub
  python scripts/finetune.py --do_train --do_eval --horizontal_layers 3 \\
      --model_name_or_path google/vit-base-patch16-224 \\
      --ignore_mismatched_sizes --dataset_name uoft-cs/cifar100 \\
      --output_dir outputs/cifar100
  # own photographs, one subfolder per class
  python scripts/finetune.py --do_train --do_eval --horizontal_layers 3 \\
      --model_name_or_path google/vit-base-patch16-224 \\
      --ignore_mismatched_sizes --train_dir photos/train \\
      --output_dir outputs/photos
  # from scratch
  python scripts/finetune.py --do_train --do_eval --vertical_layers 4 \\
      --from_scratch --model_type cct --image_size 32 \\
      --dataset_name uoft-cs/cifar10 --output_dir outputs/cct
  # a recipe, with a change
  python scripts/finetune.py --recipe digits-quickstart --num_train_epochs 60
  # evaluation of a trained model
  python scripts/finetune.py --do_eval --dataset_name uoft-cs/cifar100 \\
      --model_name_or_path outputs/cifar100

Additions to such a command, which ... stands for:

  # several processes
  accelerate launch --num_processes 4 scripts/finetune.py ...
  # resuming after an interruption; the command can be repeated
  python scripts/finetune.py ... --resume_from_checkpoint auto
  # LoRA
  python scripts/finetune.py ... --lora_rank 8 --learning_rate 1e-3
  # upload of the trained model
  python scripts/finetune.py ... --push_to_hub --hub_model_id USER/NAME
  # forecast of what the settings do, without training
  python scripts/finetune.py ... --dry_run

A recipe is a YAML file of these options (by name from hf_tokenmixup's recipes,
or by path); flags override it. --print_recipe RECIPE prints one with all of its
options.
"""

import atexit
import dataclasses
import logging
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

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
from ..evaluation.calibration import forecast_settings
from ..hub.model_card import TrainingCardData
from ..hub.upload import HubUploadError
from ..metrics import compute_metrics, top_predictions
from ..models import TokenMixupModelMixin, class_names, get_image_size, height_and_width, load_classifier
from ..training import (
    JsonlLoggerCallback,
    NonFiniteLossError,
    SaveError,
    TokenMixupTrainer,
    TokenMixupTrainingArguments,
    TrainingCurvesCallback,
)
from ..training.checkpointing.integrity import get_last_complete_checkpoint
from ..training.effective_settings import mixed_precision
from ..training.mixing_summary import describe_mixing
from ..training.processes import check_equal, on_all_processes
from ..utils.environment import public_dataset, redact_command
from .arguments import DataArguments, ModelArguments, ParsedArguments, build_parser, format_recipe, parse_options
from .forecast_text import first_batches, format_forecast
from .launch_command import launch_command
from .log_lines import print_log_as_lines
from .parser import flags_by_parameter
from .processors import open_image_processor, override_attributes
from .program import exit_with, invocation, out_of_memory_message, program_name, worker_error
from .recipes import take_option
from .threads import use_physical_cores
from .validation import (
    validate_image_size,
    validate_normalization,
    validate_normalization_in_force,
    validate_options,
    validate_run,
    warn_of_unused_options,
)

logger = logging.getLogger(__name__)

LOADING_OPTIONS = (
    "dataset_name",
    "dataset_config_name",
    "train_dir",
    "validation_dir",
    "image_column_name",
    "label_column_name",
    "classes",
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
    "classes",
    "eval_split",
    "max_eval_samples",
)


def load_image_processor(args: ModelArguments, model: PreTrainedModel) -> BaseImageProcessor:
    """The model's image processor, with the attributes, size, mean and standard deviation that were given.

    A model without a name gets a `ViTImageProcessor` of its image size.

    Raises:
        ValueError: A number is not possible, or the size of the image processor cannot be changed.
    """
    validate_normalization("image_mean", args.image_mean)
    validate_normalization("image_std", args.image_std)
    name = args.image_processor_name or args.model_name_or_path
    size = parse_image_size(args)
    if name is None:
        height, width = height_and_width(size or get_image_size(model.config) or 224)
        processor = ViTImageProcessor(size={"height": height, "width": width})
        processor = override_attributes(processor, args.parse_image_processor_overrides())
    else:
        try:
            processor = open_image_processor(name, **args.hub_kwargs())
        except ValueError as error:
            raise ValueError(f"{error} --image_processor_name selects another one than the model's.") from error
        processor = override_attributes(processor, args.parse_image_processor_overrides())
        if size is not None:
            resize_image_processor(processor, *height_and_width(size))
    for key in ("image_mean", "image_std"):
        if getattr(args, key) is not None:
            setattr(processor, key, getattr(args, key))
    validate_normalization_in_force(processor, args.image_mean, args.image_std)
    return processor


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


def print_summary(metrics: dict[str, float], trainer: TokenMixupTrainer) -> None:
    """Print the accuracy, and the paths of the files."""
    folder = Path(trainer.args.output_dir)
    lines = []
    if "eval_top1" in metrics:
        accuracy = f"top-1 {metrics['eval_top1']:.2%}"
        if trainer.classifier_model.config.num_labels > 5:
            accuracy += f"   top-5 {metrics['eval_top5']:.2%}"
        lines.append(f"{accuracy}   calibration error {metrics['eval_calibration_error']:.4f}")
    if mixing := describe_mixing(metrics, trainer.classifier_model.config, trainer.mixing_totals.complete):
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
    words = []
    for name, value in values.items():
        if isinstance(value, list):
            words += [f"--{name}", *value]
        elif value is not None:
            words += [f"--{name}={value}"]
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
    if options.dry_run:
        args.push_to_hub, args.resume_from_checkpoint = False, None
    if options.dry_run or (not (args.do_train or args.push_to_hub) and args.output_dir_is_default):
        # The Trainer creates its output folder, and an evaluation or a dry run saves nothing in it.
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
    augmentation = dataclasses.asdict(options.augmentation)
    train_transform, eval_transform = build_transforms(processor, **augmentation, normalize_on_device=True)
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
        device_transform=train_transform.device_transform,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collate,
        processing_class=processor,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=top_predictions,
        callbacks=[JsonlLoggerCallback(), TrainingCurvesCallback()] if args.do_train else None,
    )
    trainer.dry_run = options.dry_run
    print_log_as_lines(trainer)
    # After the trainer is built, since its accelerator has the launcher's settings.
    for name, card_data in build_card_data(options, arguments, data, trainer).items():
        setattr(trainer, name, card_data)
    return trainer


def print_forecast(trainer: TokenMixupTrainer) -> None:
    """Print what the settings of TokenMixup do in the first batches of a run."""
    model = trainer.classifier_model
    text = f"{type(model).__name__} does not support TokenMixup."
    if isinstance(model, TokenMixupModelMixin):
        text = format_forecast(forecast_settings(model, first_batches(trainer), seed=trainer.args.seed), model.config)
    if trainer.is_world_process_zero():
        print(f"Dry run: nothing is trained or written.\n{text}")


def train_and_evaluate(trainer: TokenMixupTrainer) -> None:
    """Train, evaluate, save and upload, as the trainer's arguments have it; with `--dry_run`, print a forecast.

    Raises:
        SystemExit: SIGTERM ended the run, after a checkpoint was saved.
    """
    args, metrics = trainer.args, {}
    if trainer.dry_run:
        print_forecast(trainer)
        return
    if args.do_train:
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        if trainer.timed_out:
            if trainer.is_world_process_zero():
                step, last = trainer.state.global_step, trainer.state.max_steps
                print(f"Stopped at step {step} of {last}. With --resume_from_checkpoint auto the run continues.")
            return
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
