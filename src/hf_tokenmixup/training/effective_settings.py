"""The settings of a run, read from the objects that apply them.

They can differ from the training arguments because of `accelerate launch`, its configuration file, environment
variables, the optimizer of the user or the model.
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

MIXING_ARGS = (
    "mixup_alpha",
    "cutmix_alpha",
    "mixup_prob",
    "mixup_switch_prob",
    "mixup_mode",
    "label_smoothing_factor",
)


def mixed_precision(accelerator: Accelerator) -> str:
    """Return the autocast precision of forward passes: `bf16`, `fp16`, `fp8` or `no`."""
    is_active = accelerator.native_amp or accelerator.distributed_type == DistributedType.DEEPSPEED
    return accelerator.mixed_precision if is_active else "no"


def is_compiled(accelerator: Accelerator) -> bool:
    """Return whether the accelerator compiles the model."""
    return accelerator.state.dynamo_plugin.backend != DynamoBackend.NO


def weights_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of most floating-point weights of a model."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=sizes.get, default=torch.float32)


def images_per_step(trainer: "TokenMixupTrainer") -> int:
    """Return the number of images of an optimizer step, over all micro-batches and processes."""
    args = trainer.args
    # `auto_find_batch_size` can reduce the batch size of the arguments.
    batch_size = trainer._train_batch_size
    processes = 1 if trainer.accelerator.split_batches else args.world_size
    return batch_size * args.gradient_accumulation_steps * processes


def devices(trainer: "TokenMixupTrainer") -> int:
    """Return the number of devices. A process has several devices with `DataParallel`."""
    return trainer.args.world_size * max(1, trainer.args.n_gpu)


def forward_precision(trainer: "TokenMixupTrainer", weights: torch.dtype | None = None) -> str:
    """Return the precision of forward passes as text, see `hf_tokenmixup.utils.environment.describe_precision`.

    Args:
        trainer: Trainer of the run.
        weights: Dtype of the weights. None: that of the model.
    """
    weights = weights_dtype(trainer.unwrapped_model) if weights is None else weights
    return describe_precision(mixed_precision(trainer.accelerator), weights, trainer.accelerator.device)


def optimization_settings(trainer: "TokenMixupTrainer") -> dict[str, Any]:
    """Return the settings of optimizer and scheduler by name. Objects of the user override the training arguments."""
    args, user_settings = trainer.args, trainer.user_optimization
    settings: dict[str, Any] = {"optim": getattr(args.optim, "value", args.optim), "optim_args": args.optim_args}
    settings |= {"learning_rate": args.learning_rate, "weight_decay": args.weight_decay}
    if "optim" in user_settings:
        del settings["optim_args"], settings["learning_rate"], settings["weight_decay"]
    if args.layer_decay != 1:
        settings["layer_decay"] = args.layer_decay
    settings |= {"max_grad_norm": args.max_grad_norm}
    if "lr_scheduler_type" not in user_settings:
        settings["lr_scheduler_type"] = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        settings |= {"lr_scheduler_kwargs": args.lr_scheduler_kwargs, "warmup_steps": args.warmup_steps}
    return settings | user_settings


def get_user_optimization(trainer: Trainer) -> dict[str, Any]:
    """Return the settings of the optimizer and the scheduler that the user passed to the trainer.

    Returns:
        Settings by name, empty without such objects. Different values of parameter groups are joined by commas.
    """
    settings = {}
    if trainer.optimizer is not None:
        settings = {"optim": type(trainer.optimizer).__name__}
        groups = trainer.optimizer.param_groups
        # With a scheduler, `lr` may be that of the first warm-up step.
        settings["learning_rate"] = _join_values([group.get("initial_lr", group["lr"]) for group in groups])
        for name in ("weight_decay", "momentum"):
            if name in groups[0]:
                settings[name] = _join_values([group[name] for group in groups])
    elif trainer.optimizer_cls_and_kwargs is not None:
        optimizer_class, kwargs = trainer.optimizer_cls_and_kwargs
        settings = {"optim": optimizer_class.__name__, "learning_rate": kwargs.get("lr")}
        settings |= {name: kwargs[name] for name in ("weight_decay", "momentum") if name in kwargs}
    if trainer.lr_scheduler is not None:
        settings["lr_scheduler_type"] = type(trainer.lr_scheduler).__name__
    return settings


def _join_values(values: list[float]) -> float | str:
    values = list(dict.fromkeys(map(float, values)))
    return values[0] if len(values) == 1 else ", ".join(f"{value:g}" for value in values)


def hyperparameters(trainer: "TokenMixupTrainer") -> dict[str, Any]:
    """Return the hyperparameters of a run for its model card, without those that are off."""
    args, accelerator = trainer.args, trainer.accelerator
    # `max_steps` overrides the number of epochs.
    duration = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    batch_size = trainer._train_batch_size // max(1, args.n_gpu)
    precision = mixed_precision(accelerator)
    weights = weights_dtype(trainer.unwrapped_model)
    ema = trainer.ema_model
    settings = {
        duration: getattr(args, duration),
        "per_device_train_batch_size": batch_size,
        "split_batches": accelerator.split_batches,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        **optimization_settings(trainer),
        **{name: getattr(args, name) for name in MIXING_ARGS},
        "ema_decay": args.ema_decay if ema is None else ema.decay,
        "ema_warmup": args.ema_warmup if ema is None else ema.warmup,
        "mixed_precision": None if precision == "no" else precision,
        "weights_dtype": None if weights == torch.float32 else str(weights).removeprefix("torch."),
        "torch_compile": is_compiled(accelerator),
        "seed": args.seed,
        "data_seed": args.data_seed,
    }
    settings = {name: value for name, value in settings.items() if value not in (None, False, "", {})}
    return settings | {
        "processes": args.world_size,
        **_sharding_settings(trainer),
        **get_adapter_hyperparameters(trainer.classifier_model),
        **_partial_training_settings(trainer),
    }


def _sharding_settings(trainer: "TokenMixupTrainer") -> dict[str, Any]:
    """Return the settings of FSDP or DeepSpeed, empty without them."""
    state = trainer.accelerator.state
    if trainer.is_fsdp_enabled:
        return {"fsdp_version": getattr(state.fsdp_plugin, "fsdp_version", 1)}
    if trainer.is_deepspeed_enabled:
        return {"deepspeed_zero_stage": state.deepspeed_plugin.zero_stage}
    return {}


def _partial_training_settings(trainer: "TokenMixupTrainer") -> dict[str, Any]:
    """Return the number of trainable parameters if some are frozen, and of skipped steps if there are any."""
    parameters = list(trainer.classifier_model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    settings: dict[str, Any] = {}
    if trainable < total:
        settings["trainable_parameters"] = f"{trainable:,} of {total:,}"
    if trainer.skipped_steps:
        settings["skipped_steps"] = trainer.skipped_steps
    return settings
