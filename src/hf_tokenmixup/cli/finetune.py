"""Train or fine-tune an image classifier with TokenMixup.

  accelerate launch scripts/finetune.py --recipe digits-quickstart
  accelerate launch scripts/finetune.py --model_name_or_path google/vit-base-patch16-224 --ignore_mismatched_sizes \\
      --dataset_name uoft-cs/cifar100 --do_train --do_eval --horizontal_layers 3 --vertical_layers 4 \\
      --output_dir outputs/cifar100
  accelerate launch scripts/finetune.py --model_name_or_path outputs/cifar100 --dataset_name uoft-cs/cifar100 --do_eval

A recipe is a YAML file of these options (by name from hf_tokenmixup's recipes, or by path); flags override it.
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

from transformers import PreTrainedModel, ViTImageProcessor, set_seed

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
from ..evaluation.flops import count_macs
from ..hub.model_card import TrainingCardData
from ..hub.upload import HubUploadError, check_license
from ..metrics import compute_metrics, top_classes
from ..models import FAMILIES, border_hint, class_names, height_and_width, load_classifier
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
from ..training.processes import check_equal, on_all_processes
from ..utils.environment import public_dataset, redact_command
from .arguments import DataArguments, ModelArguments, Options, parse_options
from .launch_command import launch_command
from .optimizer_checks import validate_optimizer_args
from .processors import open_image_processor
from .program import exit_with, invocation, lack_of_memory, program_name, worker_error
from .recipes import RECIPES
from .threads import use_physical_cores

logger = logging.getLogger(__name__)

METRICS = ("top1", "top5", "loss")


def load_image_processor(args: ModelArguments, model: PreTrainedModel):
    """The model's image processor, at `image_size` if given; for a new model, a plain one of the model's image size.

    Raises:
        ValueError: for impossible numbers, and for an image processor whose size cannot be changed.
    """
    for flag, numbers in (("--image_mean", args.image_mean), ("--image_std", args.image_std)):
        wrong = numbers is not None and any(not math.isfinite(x) or flag == "--image_std" and x <= 0 for x in numbers)
        if wrong or numbers is not None and len(numbers) not in (1, 3):
            what = "numbers above 0" if flag == "--image_std" else "finite numbers"
            raise ValueError(f"{flag} must be three {what}, or one for all channels, got {numbers}.")
    name = args.image_processor_name or args.model_name_or_path
    if name is None:
        height, width = height_and_width(image_size(args) or getattr(model.config, "image_size", 224))
        processor = ViTImageProcessor(size={"height": height, "width": width})
    else:
        try:
            processor = open_image_processor(name, **hub_options(args))
        except ValueError as error:
            raise ValueError(f"{error} --image_processor_name takes another than the model's.") from error
        if args.image_size is not None:
            resize_image_processor(processor, *height_and_width(image_size(args)))
    for key in ("image_mean", "image_std"):
        if getattr(args, key) is not None:
            setattr(processor, key, getattr(args, key))
    return processor


def image_size(args: ModelArguments) -> int | list[int] | None:
    """`--image_size` as a configuration has it: a side, or height and width; None if it is not given.

    Raises:
        ValueError: unless there are one or two numbers of at least 1.
    """
    size = args.image_size
    if size is None:
        return None
    if len(size) not in (1, 2) or min(size) < 1:
        raise ValueError(
            f"--image_size must be a side, or height and width, of at least 1 pixel, got {' '.join(map(str, size))}."
        )
    return size[0] if len(size) == 1 else list(size)


def check_image_size(model: PreTrainedModel, height: int, width: int) -> None:
    """
    Raises:
        ValueError: the model takes no images of the size that the image processor makes.
    """
    size = height_and_width(getattr(model.config, "image_size", None) or (height, width))
    try:
        count_macs(model, (3, height, width))
    except ValueError as error:
        if size == (height, width):
            raise
        choices = {
            f"{rows}x{columns}": f"--image_size {rows}" + (f" {columns}" if rows != columns else "")
            for rows, columns in ((height, width), size)
        }
        made, built = choices
        raise ValueError(
            f"The image processor makes images of {made} pixels, and the model is for {built}. Pass {choices[made]} "
            f"to set the model to {made} (its learned positions are interpolated), or {choices[built]} to set the "
            f"image processor to {built}. ({error})"
        ) from error
    differs = size != (height, width) and model.config.model_type in FAMILIES
    if differs and (hint := border_hint(model.config, (height, width))):
        logger.warning(hint)


def hub_options(args: ModelArguments) -> dict[str, Any]:
    options = {"revision": args.model_revision, "token": args.token, "cache_dir": args.cache_dir}
    return {key: value for key, value in options.items() if value is not None}


def build_train_dataset(
    data: ImageDatasetSplits, transform: Callable, options: DataArguments, seed: int
) -> ImageClassificationData | ImageClassificationIterableDataset:
    given = {"image_column": data.image_column, "label_column": data.label_column, "split": data.train_split}
    if options.streaming:
        given |= {"shuffle_buffer": options.shuffle_buffer, "num_images": data.num_train_examples}
        return ImageClassificationIterableDataset(data.train, transform, seed=seed, **given)
    return ImageClassificationData(data.train, transform, seed=seed, cache_gib=options.image_cache_gib, **given)


def build_eval_dataset(
    data: ImageDatasetSplits, transform: Callable, options: DataArguments, label_map: Sequence[int] | None
) -> ImageClassificationData | ImageClassificationIterableDataset:
    given = {"image_column": data.image_column, "label_column": data.label_column, "split": data.eval_split}
    if options.streaming:
        return ImageClassificationIterableDataset(data.evaluation, transform, label_map=label_map, **given)
    cache = options.image_cache_gib
    return ImageClassificationData(data.evaluation, transform, label_map=label_map, cache_gib=cache, **given)


def validate_lora_args(model_args: ModelArguments, args: TokenMixupTrainingArguments) -> None:
    """
    Raises:
        ValueError: the model that LoRA is to adapt has fresh weights, or is what the training itself overwrites.
    """
    name = model_args.model_name_or_path
    if model_args.from_scratch:
        raise ValueError("--lora_rank adapts a trained model, and --from_scratch gives none: leave one of them out.")
    if args.do_train and name is not None and Path(name).resolve() == Path(args.output_dir).resolve():
        raise ValueError(
            f"With --lora_rank, checkpoints hold the adapters alone and need the model in {name} as it is: name "
            "another --output_dir."
        )


def report(metrics: dict[str, float], trainer: TokenMixupTrainer) -> None:
    """Print what came out, and where it lies."""
    folder = Path(trainer.args.output_dir)
    lines = []
    if "eval_top1" in metrics:
        lines.append(f"top-1 {metrics['eval_top1']:.2%}   top-5 {metrics['eval_top5']:.2%}")
    if trainer.args.do_train:
        lines.append(f"model    {folder}")
    names = ("all_results.json", JsonlLoggerCallback.file_name, TrainingCurvesCallback.file_name)
    for what, name in zip(("metrics", "log", "curves"), names, strict=True):
        if (folder / name).exists():
            lines.append(f"{what:8} {folder / name}")
    print("\n" + "\n".join(lines))


def dataset_of(options: DataArguments, folder: str | None) -> str:
    """What to call the dataset, or the image folder in its place, in a card."""
    if options.dataset_name is not None:
        return public_dataset(options.dataset_name)
    return public_dataset(folder, "image folder")


def build_card_data(
    options: Options, arguments: Sequence[str], data: ImageDatasetSplits, trainer: TokenMixupTrainer
) -> dict[str, Any]:
    """What the model card tells of this run and the trainer cannot know."""
    model_args, data_args, args = options.model, options.data, options.training
    training = TrainingCardData(
        dataset=dataset_of(data_args, data_args.train_dir or data_args.validation_dir),
        dataset_config=data_args.dataset_config_name,
        license=model_args.license,
        base_model=None if model_args.from_scratch else model_args.model_name_or_path,
        train_split=data.train_split,
        recipe=options.recipe,
        command=redact_command(f"{launch_command(trainer)} {invocation('finetune')}", arguments),
        hyperparameters=dataclasses.asdict(options.augmentation),
    )
    # evaluate.py holds images out of `train` alone: a result that no command repeats stays out of the card.
    if not args.do_eval or (data.eval_is_split_from_train and data_args.train_split != "train"):
        return {"training_card_data": training}
    names = "dataset_name dataset_config_name validation_dir label_column_name eval_split max_eval_samples".split()
    given = [f"--{name}={getattr(data_args, name)}" for name in names if getattr(data_args, name) is not None]
    if data.eval_is_split_from_train:
        given += [f"--train_val_split={data_args.train_val_split}"]
    if data.eval_is_split_from_train or data_args.max_eval_samples:
        given += [f"--seed={args.seed}"]
    precision = mixed_precision(trainer.accelerator)
    given += [f"--dtype={precision}"] if precision in ("bf16", "fp16") else []
    evaluation = {
        "dataset": dataset_of(data_args, data_args.validation_dir or data_args.train_dir),
        "dataset_config": data_args.dataset_config_name,
        "dataset_revision": data.revision,
        "dataset_fingerprint": data.eval_fingerprint,
        "split": data.eval_split,
        "command": redact_command(f"python {invocation('evaluate')} {{model}}", given),
    }
    return {"training_card_data": training, "eval_card_data": evaluation}


def load_data(
    data_args: DataArguments, model_args: ModelArguments, args: TokenMixupTrainingArguments
) -> ImageDatasetSplits:
    names = """dataset_name dataset_config_name train_dir validation_dir image_column_name label_column_name
        train_split eval_split max_train_samples max_eval_samples""".split()
    given = {name: getattr(data_args, name) for name in names}
    given |= {"cache_dir": model_args.cache_dir, "token": model_args.token}
    given |= {"do_train": args.do_train, "do_eval": args.do_eval}

    def load() -> ImageDatasetSplits:
        if data_args.streaming:
            return load_streaming_image_dataset(**given)
        with args.main_process_first(desc="loading the dataset"):
            return load_image_dataset(validation_fraction=data_args.train_val_split, seed=args.seed, **given)

    data = on_all_processes(load)
    names = ("train_split", "eval_split", "image_column", "label_column", "label_names")
    found = {name: getattr(data, name) for name in names}
    if not data_args.streaming:
        found |= {
            f"images to {name}": len(part)
            for name, part in (("train", data.train), ("evaluate", data.evaluation))
            if part is not None
        }
    check_equal("The dataset", found, "Give all processes the same files.")
    return data


def check_apart_from_data(output_dir: str, data_args: DataArguments) -> None:
    """
    Raises:
        ValueError: The output folder is a folder of the dataset or inside of one, and what is written there would be
            read as data by the next run.
    """
    output = Path(output_dir).resolve()
    for name in ("train_dir", "validation_dir", "dataset_name"):
        folder = getattr(data_args, name)
        if folder and folder != "digits" and Path(folder).is_dir() and output.is_relative_to(Path(folder).resolve()):
            raise ValueError(
                f"--output_dir {output_dir} is inside the data, --{name} {folder}: name a folder outside of it."
            )


def warn_of_unused_options(args: TokenMixupTrainingArguments) -> None:
    """Log a warning for each option that has no effect without another one."""
    if args.eval_steps is not None and args.eval_strategy == "no":
        logger.warning("--eval_steps has no effect without --eval_strategy steps.")
    if args.hub_model_id is not None and not args.push_to_hub:
        logger.warning("--hub_model_id has no effect without --push_to_hub: nothing is uploaded.")


def prepare(arguments: Sequence[str]) -> TokenMixupTrainer:
    """Everything up to the first step: options, data, model, trainer."""
    options = parse_options(arguments, RECIPES, __doc__)
    model_args, data_args, augmentation, args, _, lora, tokenmixup = options
    if args.do_predict:
        raise ValueError(
            "--do_predict has no effect: this script trains and evaluates. To measure a model, pass --do_eval and "
            "--eval_split; to predict, open the output folder with pipeline('image-classification')."
        )
    if args.label_names not in (None, ["labels"]):
        raise ValueError(f"--label_names must be labels, got {' '.join(args.label_names)}: omit it.")
    if not (args.do_train or args.do_eval):
        raise ValueError("Nothing to do: give --do_train, --do_eval or both (a recipe may do so).")
    if model_args.from_scratch and not args.do_train:
        raise ValueError(
            "--do_eval without --do_train measures trained weights, and --from_scratch gives random ones: omit "
            "--from_scratch, or add --do_train."
        )
    if not (args.do_train or args.push_to_hub) and args.output_dir_is_default:
        # Nothing is to be saved, and the Trainer makes its output folder.
        args.output_dir = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, args.output_dir, ignore_errors=True)
    logging.basicConfig(format="%(message)s", level=logging.WARNING if args.should_log else logging.ERROR)
    warn_of_unused_options(args)
    use_physical_cores(args.device)
    set_seed(args.seed)
    on_all_processes(lambda: check_writable(args.output_dir))
    if model_args.license is not None:
        check_license(model_args.license, on_hub=args.push_to_hub, token=args.hub_token)
    if lora.lora_rank:
        validate_lora_args(model_args, args)
    if args.resume_from_checkpoint is not None:
        args.resume_from_checkpoint = resolve_resume_checkpoint(args.resume_from_checkpoint, args.output_dir)
    elif args.do_train:
        on_all_processes(lambda: check_no_existing_checkpoints(args.output_dir))
    if args.do_train:
        check_apart_from_data(args.output_dir, data_args)
    if model_args.model_revision is not None and Path(model_args.model_name_or_path or ".").is_dir():
        what = "no model was named" if model_args.model_name_or_path is None else "this is a folder"
        raise ValueError(f"--model_revision is for models on the Hub, and {what}: omit it.")
    if args.do_train:
        validate_optimizer_args(args)
    if args.greater_is_better is not None and args.metric_for_best_model is not None:
        better = not args.metric_for_best_model.endswith("loss")
        if args.greater_is_better != better:
            raise ValueError(
                f"--greater_is_better is {args.greater_is_better} with --metric_for_best_model "
                f"{args.metric_for_best_model}, which would choose the worst model: omit it."
            )
    if args.metric_for_best_model is not None and args.metric_for_best_model.removeprefix("eval_") not in METRICS:
        raise ValueError(
            f"--metric_for_best_model must be one of {', '.join(METRICS)}, got {args.metric_for_best_model!r}."
        )

    data = load_data(data_args, model_args, args)
    model = load_classifier(
        model_args.model_name_or_path,
        model_type=model_args.model_type,
        from_scratch=model_args.from_scratch,
        plain=not args.do_train,
        label_names=data.label_names if args.do_train else None,
        tokenmixup=tokenmixup,
        config_overrides=model_args.parse_config_overrides(),
        image_size=image_size(model_args),
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        attn_implementation=model_args.attn_implementation,
        **hub_options(model_args),
    )
    label_map = None
    if args.do_train and lora.lora_rank:
        model = lora.apply(model)
        if args.should_log:
            model.print_trainable_parameters()
    if not args.do_train:
        known = class_names(model.config, str(model_args.model_name_or_path))
        label_map = build_label_mapping(known, data.label_names, data_args.label_mapping)
    if args.do_train and args.per_device_train_batch_size == 1 and getattr(model.config, "horizontal_layers", []):
        logger.warning(
            "horizontal_layers have no effect in batches of one image, which has no partner. Pass a larger "
            "--per_device_train_batch_size."
        )
    processor = load_image_processor(model_args, model)
    train_transform, eval_transform = build_transforms(processor, **dataclasses.asdict(augmentation))
    (height, width), *_ = infer_image_processor_config(processor)
    check_image_size(model, height, width)
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
    # The trainer knows what the launcher decided.
    for name, facts in build_card_data(options, arguments, data, trainer).items():
        setattr(trainer, name, facts)
    return trainer


def run(trainer: TokenMixupTrainer) -> None:
    """Train, evaluate, save, and tell where things lie."""
    args, metrics = trainer.args, {}
    if args.do_train:
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        if trainer.terminated:
            # As a program has it that ends by this signal; a cluster does not leave the time for more.
            sys.exit(128 + signal.SIGTERM)
        if args.load_best_model_at_end and trainer.state.best_model_checkpoint is None:
            logger.warning(
                "--load_best_model_at_end has no effect: no checkpoint was evaluated. The last weights are saved."
            )
        # By itself it would upload too, before there is anything to tell in the card.
        trainer.save_model(_internal_call=True)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
        metrics |= result.metrics
    if args.do_eval:
        evaluated = trainer.evaluate()
        if args.do_train or not args.output_dir_is_default:
            trainer.save_metrics("eval", evaluated)
        metrics |= evaluated
    if args.do_train:
        trainer.create_model_card()
    if trainer.is_world_process_zero():
        report(metrics, trainer)
    if args.push_to_hub:
        commit = trainer.push_to_hub()
        if commit is not None:
            print(f"on the Hub  {commit.repo_url}")


def main(arguments: Sequence[str]) -> None:
    """Prepare a training run and run it.

    Raises:
        ValueError: for an option, a model or data that cannot be used.
        SystemExit: after SIGTERM or an interruption.
    """
    run(prepare(arguments))


def exit_for_memory(error: MemoryError | RuntimeError) -> NoReturn:
    """End with one line for an error of too little memory; raise any other one again."""
    found = lack_of_memory(error)
    if found is None:
        raise error
    exit_with(
        f"not enough memory ({found}). Pass a lower --per_device_train_batch_size with more "
        "--gradient_accumulation_steps, a lower --per_device_eval_batch_size, fewer --dataloader_num_workers, a "
        "smaller --image_size, or --bf16."
    )


def entry_point() -> None:
    program = program_name()
    try:
        trainer = prepare(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        exit_with(error)
    except (MemoryError, RuntimeError) as error:
        exit_for_memory(error)
    try:
        run(trainer)
    except KeyboardInterrupt:
        newest = get_last_complete_checkpoint(trainer.args.output_dir)
        found = "no checkpoint was written yet" if newest is None else f"--resume_from_checkpoint last is {newest}"
        print(f"\n{program}: interrupted; {found}.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except HubUploadError as error:
        exit_with(f"the training is complete, the upload is not. {error}")
    except (MemoryError, RuntimeError) as error:
        exit_for_memory(error)
    except (ValueError, NonFiniteLossError, SaveError) as error:
        in_worker = worker_error(error)
        raised_in = in_worker[0] if in_worker else Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not raised_in.is_relative_to(Path(__file__).parents[1]):
            # Not an error that this package raises: its traceback is worth seeing.
            raise
        exit_with(error)


if __name__ == "__main__":
    entry_point()
