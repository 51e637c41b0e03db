"""The settings that a run trains with, read from the objects that apply them.

The arguments hold what was asked for. `accelerate launch`, its configuration file, the environment, an optimizer that
the user made, and the model itself may have decided otherwise.
"""

from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn
from transformers import Trainer

from ..utils.environment import describe_precision
from .lora import get_adapter_hyperparameters

if TYPE_CHECKING:
    from .trainer import TokenMixupTrainer

MIXING = "mixup_alpha cutmix_alpha mixup_prob mixup_switch_prob mixup_mode label_smoothing_factor"


def mixed_precision(accelerator: Accelerator) -> str:
    """`no`, or the precision in which forwards compute what they may: `bf16`, `fp16` or `fp8`."""
    in_force = accelerator.native_amp or accelerator.distributed_type == DistributedType.DEEPSPEED
    return accelerator.mixed_precision if in_force else "no"


def is_compiled(accelerator: Accelerator) -> bool:
    """Whether the accelerator compiles the model that it prepares."""
    return accelerator.state.dynamo_plugin.backend != DynamoBackend.NO


def weights_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most of a model's floating-point weights."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=sizes.get, default=torch.float32)


def images_per_step(trainer: "TokenMixupTrainer") -> int:
    """Images of an optimizer step, over all micro-batches and processes."""
    args = trainer.args
    # Differs from that of the arguments with `auto_find_batch_size`.
    batch_size = trainer._train_batch_size
    processes = 1 if trainer.accelerator.split_batches else args.world_size
    return batch_size * args.gradient_accumulation_steps * processes


def devices(trainer: "TokenMixupTrainer") -> int:
    """How many devices train: a process has several with `DataParallel`."""
    return trainer.args.world_size * max(1, trainer.args.n_gpu)


def forward_precision(trainer: "TokenMixupTrainer", weights: torch.dtype | None = None) -> str:
    """The precision of forwards, see :func:`~hf_tokenmixup.utils.environment.describe_precision`.

    Args:
        trainer: with its accelerator.
        weights: dtype of the weights; None: as the model has them.
    """
    weights = weights_dtype(trainer.unwrapped_model) if weights is None else weights
    return describe_precision(mixed_precision(trainer.accelerator), weights, trainer.accelerator.device)


def optimization_settings(trainer: "TokenMixupTrainer") -> dict[str, Any]:
    """Optimizer and schedule by name and value; those of an optimizer that the user made are read from it."""
    args, given = trainer.args, trainer.given_optimization
    settings: dict[str, Any] = {"optim": getattr(args.optim, "value", args.optim), "optim_args": args.optim_args}
    settings |= {"learning_rate": args.learning_rate, "weight_decay": args.weight_decay}
    if "optim" in given:
        del settings["optim_args"], settings["learning_rate"], settings["weight_decay"]
    settings |= {"max_grad_norm": args.max_grad_norm}
    if "lr_scheduler_type" not in given:
        settings["lr_scheduler_type"] = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        settings |= {"lr_scheduler_kwargs": args.lr_scheduler_kwargs, "warmup_steps": args.warmup_steps}
    return settings | given


def given_optimization(trainer: Trainer) -> dict[str, Any]:
    """Settings of the optimizer and the schedule that the user made, before they train; empty where there are none.

    Several values, one for each group of parameters, are joined by commas.
    """
    settings = {}
    if trainer.optimizer is not None:
        settings = {"optim": type(trainer.optimizer).__name__}
        groups = trainer.optimizer.param_groups
        # With a schedule, `lr` may be that of the first step of a warm-up.
        settings["learning_rate"] = _joined([group.get("initial_lr", group["lr"]) for group in groups])
        for name in ("weight_decay", "momentum"):
            if name in groups[0]:
                settings[name] = _joined([group[name] for group in groups])
    elif trainer.optimizer_cls_and_kwargs is not None:
        made_by, options = trainer.optimizer_cls_and_kwargs
        settings = {"optim": made_by.__name__, "learning_rate": options.get("lr")}
        settings |= {name: options[name] for name in ("weight_decay", "momentum") if name in options}
    if trainer.lr_scheduler is not None:
        settings["lr_scheduler_type"] = type(trainer.lr_scheduler).__name__
    return settings


def _joined(values: list[float]) -> float | str:
    values = list(dict.fromkeys(map(float, values)))
    return values[0] if len(values) == 1 else ", ".join(f"{value:g}" for value in values)


def hyperparameters(trainer: "TokenMixupTrainer") -> dict[str, Any]:
    """The hyperparameters of a run for its model card, without those that are off."""
    args, accelerator = trainer.args, trainer.accelerator
    # With a number of steps, that of epochs has no effect.
    length = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    batch_size = trainer._train_batch_size // max(1, args.n_gpu)
    precision = mixed_precision(accelerator)
    weights = weights_dtype(trainer.unwrapped_model)
    average = trainer.ema_model
    settings = {
        length: getattr(args, length),
        "per_device_train_batch_size": batch_size,
        "split_batches": accelerator.split_batches,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        **optimization_settings(trainer),
        **{name: getattr(args, name) for name in MIXING.split()},
        "ema_decay": args.ema_decay if average is None else average.decay,
        "ema_warmup": args.ema_warmup if average is None else average.warmup,
        "mixed_precision": None if precision == "no" else precision,
        "weights_dtype": None if weights == torch.float32 else str(weights).removeprefix("torch."),
        "torch_compile": is_compiled(accelerator),
        "seed": args.seed,
        "data_seed": args.data_seed,
    }
    settings = {name: value for name, value in settings.items() if value not in (None, False, "", {})}
    return settings | {
        "processes": args.world_size,
        **_distribution(trainer),
        **get_adapter_hyperparameters(trainer.classifier_model),
        **_trained(trainer),
    }


def _distribution(trainer: "TokenMixupTrainer") -> dict[str, Any]:
    """How weights or optimizer states are divided among the processes, where they are."""
    state = trainer.accelerator.state
    if trainer.is_fsdp_enabled:
        return {"fsdp_version": getattr(state.fsdp_plugin, "fsdp_version", 1)}
    if trainer.is_deepspeed_enabled:
        return {"deepspeed_zero_stage": state.deepspeed_plugin.zero_stage}
    return {}


def _trained(trainer: "TokenMixupTrainer") -> dict[str, Any]:
    """How much of the model trains where not all does, and how many steps were skipped where some were."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in trainer.classifier_model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    facts = {} if trained == total else {"trainable_parameters": f"{trained:,} of {total:,}"}
    return facts | ({"skipped_steps": trainer.skipped_steps} if trainer.skipped_steps else {})
