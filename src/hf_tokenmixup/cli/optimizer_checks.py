"""Whether an optimizer and its schedule can be made of the training arguments, before any work is done."""

import inspect

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

RESERVED_SCHEDULER_ARGS = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}


def validate_optimizer_args(args: TrainingArguments) -> None:
    """Make the optimizer and the schedule of a training for a single number, and forget them.

    Optimizers that are made for the layers of one model (`optim_target_modules`) are left to the host.

    Raises:
        ValueError: an option is none that they take, or has a value that they refuse.
    """
    if args.optim_target_modules is not None:
        return
    given = dict(
        word.partition("=")[::2] for word in filter(None, (args.optim_args or "").replace(" ", "").split(","))
    )
    if not all(given.values()):
        raise ValueError(f"--optim_args must be like 'momentum=0.9,nesterov=true', got {args.optim_args!r}.")
    optim = getattr(args.optim, "value", args.optim)
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
        # The host has factories too, which ask for a model.
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
            return
        optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **options)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"--optim {optim} with --optim_args {args.optim_args}: {error}") from error
    _refuse_unknown("--optim_args", given, optimizer_class, f"--optim {optim}")

    schedule, options = args.lr_scheduler_type, args.lr_scheduler_kwargs or {}
    name = getattr(schedule, "value", schedule)
    _refuse_unknown("--lr_scheduler_kwargs", options, TYPE_TO_SCHEDULER_FUNCTION[name], f"--lr_scheduler_type {name}")
    try:
        scheduler = get_scheduler(schedule, optimizer, 1, 2, scheduler_specific_kwargs=dict(options))
        if hasattr(scheduler, "lr_lambdas"):
            for step in range(3):
                scheduler.lr_lambdas[0](step)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"--lr_scheduler_type {name} with --lr_scheduler_kwargs {options}: {error}") from error


def _refuse_unknown(flag: str, given: dict, taker: object, whose: str) -> None:
    parameters = inspect.signature(taker).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = sorted(parameters.keys() - RESERVED_SCHEDULER_ARGS - {"params"})
    if unknown := sorted(given.keys() - set(known)):
        raise ValueError(
            f"{flag} has {', '.join(map(repr, unknown))}, which {whose} does not take. It takes "
            f"{', '.join(known) or 'none'}."
        )
