"""Room in the output folder: looked at before a training starts, and told clearly where writing to it fails."""

import errno
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from accelerate.utils import convert_bytes
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy
from transformers.utils import SAFE_WEIGHTS_NAME

from ..training_args import TokenMixupTrainingArguments
from .integrity import find_checkpoint_error, list_checkpoints

logger = logging.getLogger(__name__)

# How many numbers of 4 bytes an optimizer keeps for each parameter it trains; for those not named here as Adam does.
OPTIMIZER_STATE_TENSORS = {"sgd": 0, "adafactor": 0, "lomo": 0, "adalomo": 0, "adagrad": 1, "rmsprop": 1, "lion": 1}
DEFAULT_STATE_TENSORS = 2
# Configuration, scheduler, random state, arguments, log.
METADATA_BYTES = 256 * 1024
WRITE_ERRNOS = {
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EFBIG EROFS EIO EACCES EPERM ENOENT ENOTDIR ESTALE".split()
    if hasattr(errno, name)
}


class OutputDirError(ValueError):
    """The output folder cannot be written to, or has no room for a checkpoint; the message names a way out."""


class SaveError(OSError):
    """Something could not be written; the message names it, the folder and the last good checkpoint."""


def check_writable(folder: str | Path) -> None:
    """Make the folder if it is not there, and write a little into it, of which nothing is left.

    Raises:
        OutputDirError: that cannot be done.
    """
    if not str(folder):
        raise OutputDirError("--output_dir must name a folder, got ''.")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        raise OutputDirError(
            f"--output_dir must be a folder that can be made and written to; {folder} is not "
            f"({error.strerror or error}). Name another, or see to its rights and to the room there."
        ) from error


class CheckpointSizes(NamedTuple):
    """Bytes that a training writes: for each checkpoint, and for the published model."""

    checkpoint: int
    published: int


def estimate_checkpoint_sizes(model: nn.Module, args: TokenMixupTrainingArguments) -> CheckpointSizes:
    """What a training of `model` will write, by its tensors and the kind of optimizer."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    state = (
        0
        if args.save_only_model
        else trained * _optimizer_bytes_per_parameter(str(getattr(args.optim, "value", args.optim)), args)
    )
    average = weights if args.ema_decay else 0
    return CheckpointSizes(weights + state + average + METADATA_BYTES, weights + METADATA_BYTES)


def _optimizer_bytes_per_parameter(optim: str, args: TrainingArguments) -> int:
    """Bytes of state for each parameter."""
    kind = optim.removeprefix("paged_").partition("_")[0]
    numbers = OPTIMIZER_STATE_TENSORS.get(kind, DEFAULT_STATE_TENSORS)
    if kind in ("sgd", "rmsprop") and "momentum" in (args.optim_args or ""):
        numbers += 1
    return numbers * (1 if "8bit" in optim else 4)


def check_disk_space(model: nn.Module, args: TokenMixupTrainingArguments, state: TrainerState) -> None:
    """Compare the room in the output folder with what the training that begins now will write there.

    Raises:
        OutputDirError: not even the next checkpoint fits. A warning tells where all of them do not.
    """
    folder, sizes = Path(args.output_dir), estimate_checkpoint_sizes(model, args)
    checkpoints = _num_remaining_checkpoints(args, state)
    free = shutil.disk_usage(folder).free
    published = folder / SAFE_WEIGHTS_NAME
    # Written over, or removed before the next checkpoint is written.
    free += published.stat().st_size if published.is_file() else 0
    there = list_checkpoints(folder)
    unfinished = [checkpoint for checkpoint in there if find_checkpoint_error(checkpoint) is not None]
    if args.save_total_limit:
        free += sum(file.stat().st_size for path in unfinished for file in path.rglob("*") if file.is_file())
    at_once = checkpoints
    if args.save_total_limit:
        # The best and the last always stay, and the new one is complete before an old one goes.
        most = max(args.save_total_limit, 2 if args.load_best_model_at_end else 1) + 1
        at_once = min(checkpoints, max(1, most - (len(there) - len(unfinished))))
    needed = at_once * sizes.checkpoint + sizes.published
    told = (
        f"{folder} has {convert_bytes(free)} left. A checkpoint will take about {convert_bytes(sizes.checkpoint)}, "
        f"the model at the end {convert_bytes(sizes.published)}"
    )
    hint = "Make room there, name another --output_dir"
    if free < (sizes.checkpoint if checkpoints else sizes.published):
        raise OutputDirError(f"{told}: not enough. {hint}, or save no checkpoints (--save_strategy no).")
    if free < needed:
        count = f"{at_once} checkpoint{'s' if at_once > 1 else ''} more"
        logger.warning(
            f"{told}; {count} and the model, {convert_bytes(needed)}, will not fit. {hint}, or keep "
            "fewer checkpoints (--save_total_limit)."
        )


def _num_remaining_checkpoints(args: TrainingArguments, state: TrainerState) -> int:
    """How many checkpoints will be written; one where that is known later only."""
    left = state.max_steps - state.global_step
    if args.save_strategy == SaveStrategy.NO or left <= 0:
        return 0
    if args.save_strategy == SaveStrategy.STEPS and state.save_steps:
        return -(-state.max_steps // state.save_steps) - state.global_step // state.save_steps
    if args.save_strategy == SaveStrategy.EPOCH:
        return max(1, round(state.num_train_epochs - (state.epoch or 0)))
    return 1


def is_write_error(error: Exception) -> bool:
    """Whether an error is one of writing a file, whoever wrote it: Python, safetensors or torch."""
    if isinstance(error, OSError):
        return error.errno in WRITE_ERRNOS
    # Neither of the two hands on the system's number.
    told_by_torch = ("PytorchStreamWriter", "inline_container")
    return isinstance(error, SafetensorError) or any(name in str(error) for name in told_by_torch)


@contextmanager
def saving(what: str, output_dir: str | Path) -> Iterator[None]:
    """Around the writing of `what`, a name for a message, into the output folder of a training.

    Raises:
        SaveError: instead of the error with which the writing failed.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_write_error(error):
            raise
        raise SaveError(_format_save_error(what, Path(output_dir), error)) from error


def _format_save_error(what: str, folder: Path, error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0].strip()
    free = f", {convert_bytes(shutil.disk_usage(folder).free)} free" if folder.is_dir() else ""
    good = next(
        (checkpoint for checkpoint in list_checkpoints(folder) if find_checkpoint_error(checkpoint) is None), None
    )
    if good is None:
        return (
            f"{what} could not be written to {folder} ({reason}{free}), where there is no checkpoint to go on from. "
            "Make room there, or name another folder."
        )
    return (
        f"{what} could not be written to {folder} ({reason}{free}). The last good checkpoint is {good}: make room "
        "there, and go on with --resume_from_checkpoint last."
    )
