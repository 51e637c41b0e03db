"""Which checkpoint a training goes on from: the newest that was written to its end."""

import json
import logging
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

logger = logging.getLogger(__name__)

# The host writes this one last.
STATE_NAME = "trainer_state.json"


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The checkpoints in an output folder, the newest first."""
    named = {
        int(found[1]): path
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (found := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and path.is_dir()
    }
    return [named[step] for step in sorted(named, reverse=True)]


def last_complete_checkpoint(folder: str | Path) -> Path:
    """The newest checkpoint that is whole; a warning names those passed over.

    Raises:
        ValueError: there is none.
    """
    for checkpoint in checkpoints_in(folder):
        fault = fault_in(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning("%s was not written to its end (%s): an earlier one is looked for.", checkpoint, fault)
    raise ValueError(
        f"There is no complete checkpoint in {folder} to resume from: leave out --resume_from_checkpoint to start "
        "anew, or name the --output_dir of the training that is to go on."
    )


def check_unused(folder: str | Path) -> None:
    """
    Raises:
        ValueError: `folder` holds checkpoints of an earlier training, which a new one would mix with its own, or is
            a file.
    """
    if Path(folder).is_file():
        raise ValueError(f"--output_dir must name a folder, and {folder} is a file.")
    used = [checkpoint for checkpoint in checkpoints_in(folder) if fault_in(checkpoint) is None]
    if used:
        raise ValueError(
            f"--output_dir {folder} holds {used[0].name} of an earlier training. Go on with it by "
            "--resume_from_checkpoint last, name another --output_dir, or remove the checkpoints there."
        )


def check_checkpoint(checkpoint: str | Path) -> None:
    """
    Raises:
        ValueError: `checkpoint` is not there or not whole; names the newest that is, if any.
    """
    fault = fault_in(Path(checkpoint))
    if fault is None:
        return
    others = [other for other in checkpoints_in(Path(checkpoint).parent) if fault_in(other) is None]
    instead = f"Resume from {others[0]}" if others else "No other lies beside it; start the training anew"
    raise ValueError(f"The checkpoint {checkpoint} cannot be resumed from: {fault}. {instead}.")


def fault_in(checkpoint: Path) -> str | None:
    """What is missing or cut short in a checkpoint's files; None where all that is there is whole."""
    state = checkpoint / STATE_NAME
    if not checkpoint.is_dir():
        return "there is no such folder"
    if not state.is_file():
        return f"it has no {STATE_NAME}"
    try:
        json.loads(state.read_text(encoding="utf-8"))
        index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.is_file() else ()
    except ValueError:
        return f"{STATE_NAME} or {SAFE_WEIGHTS_INDEX_NAME} is cut short"
    for name in sorted(set(shards)):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    for file in sorted(checkpoint.glob("*.safetensors")):
        try:
            # Compares the length of the file with what its header says.
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return f"{file.name} is cut short"
    for file in sorted([*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"), *checkpoint.glob("*.bin")]):
        # torch's files are zip archives, whose table of contents stands at the end.
        if not zipfile.is_zipfile(file):
            return f"{file.name} is cut short"
    return None
