"""Checks of optimizer and scheduler arguments before data and model are loaded."""

import inspect
from collections.abc import Callable, Mapping

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

# Arguments that the Trainer sets.
RESERVED_ARGS = {"params", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}


def validate_optimizer_args(args: TrainingArguments) -> None:
    """Validate optimizer and scheduler arguments by building them for a dummy parameter.

    Transformers ignores unknown names in `optim_args`. Optimizers for parts of a model (`optim_target_modules`) are
    not checked.

    Raises:
        ValueError: Optimizer or scheduler does not accept an argument or its value.
    """
    if args.optim_target_modules is not None:
        return
    words = filter(None, (args.optim_args or "").replace(" ", "").split(","))
    optim_args = dict(word.partition("=")[::2] for word in words)
    if not all(optim_args.values()):
        raise ValueError(f"--optim_args must be like 'momentum=0.9,nesterov=true', got {args.optim_args!r}.")
    optim = getattr(args.optim, "value", args.optim)
    try:
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
            return  # A factory that needs a model.
        optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **kwargs)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"--optim {optim} with --optim_args {args.optim_args}: {error}") from error
    _validate_kwargs("--optim_args", optim_args, optimizer_class, f"--optim {optim}")

    scheduler = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    kwargs = dict(args.lr_scheduler_kwargs or {})
    scheduler_fn = TYPE_TO_SCHEDULER_FUNCTION[scheduler]
    _validate_kwargs("--lr_scheduler_kwargs", kwargs, scheduler_fn, f"--lr_scheduler_type {scheduler}")
    try:
        lr_scheduler = get_scheduler(
            scheduler, optimizer, num_warmup_steps=1, num_training_steps=2, scheduler_specific_kwargs=kwargs
        )
        if hasattr(lr_scheduler, "lr_lambdas"):
            for step in range(3):
                lr_scheduler.lr_lambdas[0](step)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"--lr_scheduler_type {scheduler} with --lr_scheduler_kwargs {kwargs}: {error}") from error


def _validate_kwargs(flag: str, kwargs: Mapping[str, object], target: Callable, target_name: str) -> None:
    """Check that `target` has parameters of these names."""
    parameters = inspect.signature(target).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = sorted(parameters.keys() - RESERVED_ARGS)
    if unknown := sorted(kwargs.keys() - set(known)):
        raise ValueError(
            f"{flag} has {', '.join(map(repr, unknown))}, which {target_name} does not take. It takes "
            f"{', '.join(known) or 'none'}."
        )
