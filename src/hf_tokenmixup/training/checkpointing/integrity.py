"""Find, validate and remove checkpoints: the latest complete one is the one that a run resumes from."""

import json
import logging
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

logger = logging.getLogger(__name__)

# Trainer writes this file last.
TRAINER_STATE_NAME = "trainer_state.json"
# The state of this package there, among the states of callbacks.
CALLBACK_STATE_KEY = "hf_tokenmixup"
MODEL_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints in an output folder, the latest first."""
    by_step = {
        int(found[1]): path
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (found := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and path.is_dir()
    }
    return [by_step[step] for step in sorted(by_step, reverse=True)]


def get_last_complete_checkpoint(folder: str | Path) -> Path | None:
    """Return the latest complete checkpoint, None if there is none; a warning names those that are skipped."""
    for checkpoint in list_checkpoints(folder):
        problem = find_checkpoint_error(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning("Skipping incomplete checkpoint %s: %s.", checkpoint, problem)
    return None


def list_incomplete_checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints whose writing or removal was interrupted."""
    return [checkpoint for checkpoint in list_checkpoints(folder) if find_checkpoint_error(checkpoint) is not None]


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint; if that is interrupted, it is incomplete."""
    (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def list_file_sizes(checkpoint: Path) -> dict[str, int]:
    """Return the sizes in bytes of the files of a checkpoint by relative path, without the file written last."""
    return {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name not in (TRAINER_STATE_NAME, f".{TRAINER_STATE_NAME}")
    }


def validate_checkpoint(checkpoint: str | Path) -> None:
    """Check that a checkpoint is complete.

    Raises:
        ValueError: It is missing or incomplete. The message names the latest complete one, if there is one.
    """
    problem = find_checkpoint_error(Path(checkpoint))
    if problem is None:
        return
    others = [other for other in list_checkpoints(Path(checkpoint).parent) if find_checkpoint_error(other) is None]
    hint = f"Resume from {others[0]}" if others else "No other checkpoint was found; start a new run"
    raise ValueError(f"The checkpoint {checkpoint} cannot be resumed from: {problem}. {hint}.")


def find_checkpoint_error(checkpoint: Path) -> str | None:
    """Return what is missing or truncated in the files of a checkpoint; None if it is complete.

    `trainer_state.json` lists the files of a checkpoint that this package wrote. Of any other checkpoint, the files
    that exist are checked, which is enough for one whose writing was interrupted.
    """
    state = checkpoint / TRAINER_STATE_NAME
    if not checkpoint.is_dir():
        return "there is no such folder"
    if not state.is_file():
        return f"it has no {TRAINER_STATE_NAME}"
    try:
        written = json.loads(state.read_text(encoding="utf-8"))
        index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.is_file() else ()
    except ValueError:
        return f"{TRAINER_STATE_NAME} or {SAFE_WEIGHTS_INDEX_NAME} is truncated"
    listed = ((written.get("stateful_callbacks") or {}).get(CALLBACK_STATE_KEY) or {}).get("files", {})
    for name in sorted(set(shards) | listed.keys()):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    for name, size in listed.items():
        if (found := (checkpoint / name).stat().st_size) != size:
            return f"{name} is truncated" if found < size else f"{name} is not the one that was written"
    for config in sorted(checkpoint.glob(f"**/{ADAPTER_CONFIG_NAME}")):
        try:
            json.loads(config.read_text(encoding="utf-8"))
        except ValueError:
            return f"{config.name} is truncated"
        if not config.with_name(ADAPTER_SAFE_WEIGHTS_NAME).is_file():
            return f"{ADAPTER_SAFE_WEIGHTS_NAME} is missing"
    # The files of an adapter are in a folder of its name.
    for file in sorted(checkpoint.glob("**/*.safetensors")):
        try:
            # Compares the length of the file with what its header says.
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return f"{file.name} is truncated"
    for file in sorted([*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"), *checkpoint.glob("*.bin")]):
        # torch's files are zip archives, whose table of contents is at the end.
        if not zipfile.is_zipfile(file):
            return f"{file.name} is truncated"
    return None
