"""Check free disk space before training, and report write errors."""

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

# Tensors of 4-byte values in the state of an optimizer, for each parameter. Others have as many as Adam.
OPTIMIZER_STATE_TENSORS = {"sgd": 0, "adafactor": 0, "lomo": 0, "adalomo": 0, "adagrad": 1, "rmsprop": 1, "lion": 1}
DEFAULT_STATE_TENSORS = 2
# Configuration, scheduler, random state, arguments, log.
METADATA_BYTES = 256 * 1024
WRITE_ERRNOS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "EACCES", "EPERM", "ENOENT", "ENOTDIR", "ESTALE")
    if hasattr(errno, name)
}


class OutputDirError(ValueError):
    """Raised if the output folder is not writable, or has no space for a checkpoint; the message says what to do."""


class SaveError(OSError):
    """Raised if a file could not be written; the message names the folder and the latest complete checkpoint."""


def check_writable(folder: str | Path) -> None:
    """Check that a folder is writable, or can be created. It is not created.

    Raises:
        OutputDirError: It is not.
    """
    if not str(folder):
        raise OutputDirError("`output_dir` must name a folder, got ''.")
    try:
        path = Path(folder).absolute()
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        raise OutputDirError(
            f"`output_dir` {folder} is not writable ({error.strerror or error}). Check its permissions and the free "
            "space there, or choose another folder."
        ) from error


class CheckpointSizes(NamedTuple):
    """Bytes that a run writes: for each checkpoint, and for the exported model."""

    checkpoint: int
    exported: int


def estimate_checkpoint_sizes(model: nn.Module, args: TokenMixupTrainingArguments) -> CheckpointSizes:
    """Estimate what a run writes, from the tensors of the model and the optimizer."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    state = (
        0
        if args.save_only_model
        else trained * _optimizer_bytes_per_parameter(str(getattr(args.optim, "value", args.optim)), args)
    )
    ema = weights if args.ema_decay else 0
    return CheckpointSizes(weights + state + ema + METADATA_BYTES, weights + METADATA_BYTES)


def _optimizer_bytes_per_parameter(optim: str, args: TrainingArguments) -> int:
    """Return the bytes of optimizer state for each parameter."""
    kind = optim.removeprefix("paged_").partition("_")[0]
    num_tensors = OPTIMIZER_STATE_TENSORS.get(kind, DEFAULT_STATE_TENSORS)
    if kind in ("sgd", "rmsprop") and "momentum" in (args.optim_args or ""):
        num_tensors += 1
    return num_tensors * (1 if "8bit" in optim else 4)


def check_disk_space(model: nn.Module, args: TokenMixupTrainingArguments, state: TrainerState) -> None:
    """Compare the free space in the output folder with what the run that begins now writes there.

    Raises:
        OutputDirError: Not even the next checkpoint fits. If not all of them fit, a warning says so.
    """
    folder, sizes = Path(args.output_dir), estimate_checkpoint_sizes(model, args)
    checkpoints = _num_remaining_checkpoints(args, state)
    free = shutil.disk_usage(folder).free
    exported = folder / SAFE_WEIGHTS_NAME
    # These are overwritten, or removed before the next checkpoint is written.
    free += exported.stat().st_size if exported.is_file() else 0
    existing = list_checkpoints(folder)
    incomplete = [checkpoint for checkpoint in existing if find_checkpoint_error(checkpoint) is not None]
    if args.save_total_limit:
        free += sum(file.stat().st_size for path in incomplete for file in path.rglob("*") if file.is_file())
    max_coexisting = checkpoints
    if args.save_total_limit:
        # The best and the last always stay, and the new one is complete before an old one is removed.
        limit = max(args.save_total_limit, 2 if args.load_best_model_at_end else 1) + 1
        max_coexisting = min(checkpoints, max(1, limit - (len(existing) - len(incomplete))))
    needed = max_coexisting * sizes.checkpoint + sizes.exported
    message = (
        f"{folder} has {convert_bytes(free)} of free space. A checkpoint needs about "
        f"{convert_bytes(sizes.checkpoint)}, the model at the end {convert_bytes(sizes.exported)}"
    )
    hint = "Free disk space there, choose another `output_dir`"
    if free < (sizes.checkpoint if checkpoints else sizes.exported):
        raise OutputDirError(f"{message}: not enough. {hint}, or save no checkpoints (`save_strategy=no`).")
    if free < needed:
        count = f"{max_coexisting} checkpoint{'s' if max_coexisting > 1 else ''} more"
        logger.warning(
            f"{message}; {count} and the model, {convert_bytes(needed)}, do not fit. {hint}, or keep "
            "fewer checkpoints (`save_total_limit`)."
        )


def _num_remaining_checkpoints(args: TrainingArguments, state: TrainerState) -> int:
    """Return how many checkpoints the run writes; 1 if the number is not known in advance."""
    steps_left = state.max_steps - state.global_step
    if args.save_strategy == SaveStrategy.NO or steps_left <= 0:
        return 0
    if args.save_strategy == SaveStrategy.STEPS and state.save_steps:
        return -(-state.max_steps // state.save_steps) - state.global_step // state.save_steps
    if args.save_strategy == SaveStrategy.EPOCH:
        return max(1, round(state.num_train_epochs - (state.epoch or 0)))
    return 1


def is_write_error(error: Exception) -> bool:
    """Return whether an error is one of writing a file by Python, safetensors or torch."""
    if isinstance(error, OSError):
        return error.errno in WRITE_ERRNOS
    # Neither of the two exposes errno.
    torch_writers = ("PytorchStreamWriter", "inline_container")
    return isinstance(error, SafetensorError) or any(name in str(error) for name in torch_writers)


@contextmanager
def saving(what: str, output_dir: str | Path) -> Iterator[None]:
    """Context manager that turns write errors into a `SaveError`.

    Args:
        what: What is written, as the subject of the message.
        output_dir: The output folder of the run.

    Raises:
        SaveError: In place of the original error.
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
    last = next(
        (checkpoint for checkpoint in list_checkpoints(folder) if find_checkpoint_error(checkpoint) is None), None
    )
    if last is None:
        return (
            f"{what} could not be written to {folder} ({reason}{free}). There is no complete checkpoint. "
            "Free disk space there, or choose another folder."
        )
    return (
        f"{what} could not be written to {folder} ({reason}{free}). The latest complete checkpoint is {last}. "
        "Free disk space there, and resume with `resume_from_checkpoint=last`."
    )
