"""Which checkpoint a training goes on from: the newest that was written to its end, and of which nothing is gone."""

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

from ..processes import connected, gather, on_main_process

logger = logging.getLogger(__name__)

# The host writes this one last.
TRAINER_STATE_NAME = "trainer_state.json"
# What is kept there for this package, among the states of callbacks.
CALLBACK_STATE_KEY = "hf_tokenmixup"
MODEL_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in an output folder, the newest first."""
    named = {
        int(found[1]): path
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (found := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and path.is_dir()
    }
    return [named[step] for step in sorted(named, reverse=True)]


def get_last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint that is whole, None if there is none; a warning names those passed over."""
    for checkpoint in list_checkpoints(folder):
        fault = find_checkpoint_error(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning("%s is not complete (%s): an earlier one is looked for.", checkpoint, fault)
    return None


def require_last_complete_checkpoint(folder: str | Path) -> Path:
    """As `get_last_complete_checkpoint`.

    Raises:
        ValueError: there is none.
    """
    checkpoint = get_last_complete_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(
            f"There is no complete checkpoint in {folder} to resume from: say --resume_from_checkpoint auto to start "
            "from the beginning then, or name the --output_dir of the training that is to go on."
        )
    return checkpoint


def resolve_resume_checkpoint(given: str, folder: str | Path) -> str | None:
    """The checkpoint that a setting asks for: a path, or in the output folder the newest whole one.

    With several processes, the main one chooses, and all of them look whether that checkpoint is complete for them
    too: with separate disks it may not be. All processes call this together.

    Args:
        given: a path; `last` (or `true`); or `auto`, with which nothing is resumed where there is no checkpoint, so
            that a command can be repeated until the training is done.
        folder: output folder.

    Raises:
        ValueError: there is none, or the one that is named or chosen is not complete, in any process.
    """
    wanted = given.lower()
    if wanted in ("auto", "last", "true"):
        choose = get_last_complete_checkpoint if wanted == "auto" else require_last_complete_checkpoint
        # The name, as each process may have an output folder of its own.
        name = on_main_process(lambda: None if (chosen := choose(folder)) is None else chosen.name)
        checkpoint = None if name is None else str(Path(folder) / name)
    else:
        checkpoint = given
    if connected():
        _check_for_all(None if checkpoint is None else Path(checkpoint), Path(folder))
    elif checkpoint == given:
        validate_checkpoint(given)
    return checkpoint


def _check_for_all(checkpoint: Path | None, folder: Path) -> None:
    """Compare what each process finds of the checkpoint that all are to resume from; None: they begin without one.

    Raises:
        ValueError: in every process, if it is not complete in one of them, or of another step.
    """
    beside = folder if checkpoint is None else checkpoint.parent
    complete = [path.name for path in list_checkpoints(beside) if find_checkpoint_error(path) is None]
    if checkpoint is None:
        fault, step = complete[0] if complete else None, None
    else:
        fault = find_checkpoint_error(checkpoint)
        step = (
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
            if not fault
            else None
        )
    everyone = gather((fault, step, complete, str(beside if checkpoint is None else checkpoint)))
    expected = (None, everyone[0][1])
    rank = next((rank for rank, found in enumerate(everyone) if found[:2] != expected), None)
    if rank is None:
        return
    common = [name for name in everyone[0][2] if all(name in found[2] for found in everyone)]
    hint = f"Resume from {common[0]}, which is complete in all processes, " if common else "Copy it there, "
    hint += (
        "or start a new run in an empty folder. All processes read the checkpoint: with separate disks, train with "
        "save_on_each_node=True."
    )
    fault, step, _, place = everyone[rank]
    place += f" of process {rank} of {len(everyone)}"
    if checkpoint is None:
        raise ValueError(
            f"{place} holds {fault}, and the main process, without a complete checkpoint, would start from the "
            f"beginning. {hint}"
        )
    fault = fault or f"it is of step {step}, and that of the main process of step {everyone[0][1]}"
    raise ValueError(f"{place} cannot be resumed from: {fault}. {hint}")


def list_incomplete_checkpoints(folder: str | Path) -> list[Path]:
    """Those in whose writing or removal a training was interrupted."""
    return [checkpoint for checkpoint in list_checkpoints(folder) if find_checkpoint_error(checkpoint) is not None]


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint so that what is left of it, if this is interrupted, is no complete one."""
    (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def list_file_sizes(checkpoint: Path) -> dict[str, int]:
    """The files of a checkpoint, by their path in it, with their sizes in bytes; all but the one written last."""
    return {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name not in (TRAINER_STATE_NAME, f".{TRAINER_STATE_NAME}")
    }


def check_no_existing_checkpoints(folder: str | Path) -> None:
    """
    Raises:
        ValueError: `folder` holds checkpoints of an earlier training, which a new one would mix with its own, or a
            model, which it would overwrite.
    """
    used = [checkpoint for checkpoint in list_checkpoints(folder) if find_checkpoint_error(checkpoint) is None]
    if used:
        raise ValueError(
            f"--output_dir {folder} holds {used[0].name} of an earlier training. Go on with it by "
            "--resume_from_checkpoint last (or auto), name another --output_dir, or remove the checkpoints there."
        )
    weights = next((name for name in MODEL_FILES if (Path(folder) / name).exists()), None)
    if weights is not None:
        raise ValueError(
            f"--output_dir {folder} holds a model ({weights}), which this run would overwrite. Name another "
            "--output_dir, or remove the model there."
        )


def validate_checkpoint(checkpoint: str | Path) -> None:
    """
    Raises:
        ValueError: `checkpoint` is not there or not whole; names the newest that is, if any.
    """
    fault = find_checkpoint_error(Path(checkpoint))
    if fault is None:
        return
    others = [other for other in list_checkpoints(Path(checkpoint).parent) if find_checkpoint_error(other) is None]
    instead = f"Resume from {others[0]}" if others else "No other lies beside it; start the training anew"
    raise ValueError(f"The checkpoint {checkpoint} cannot be resumed from: {fault}. {instead}.")


def find_checkpoint_error(checkpoint: Path) -> str | None:
    """What is missing or cut short in a checkpoint's files; None if it is whole.

    `trainer_state.json` lists the files of a checkpoint that this package wrote. Of any other, what is there is looked
    at: that is enough for one in whose writing a training was interrupted.
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
        return f"{TRAINER_STATE_NAME} or {SAFE_WEIGHTS_INDEX_NAME} is cut short"
    listed = ((written.get("stateful_callbacks") or {}).get(CALLBACK_STATE_KEY) or {}).get("files", {})
    for name in sorted(set(shards) | listed.keys()):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    for name, size in listed.items():
        if (found := (checkpoint / name).stat().st_size) != size:
            return f"{name} is cut short" if found < size else f"{name} is not the one that was written"
    for config in sorted(checkpoint.glob(f"**/{ADAPTER_CONFIG_NAME}")):
        try:
            json.loads(config.read_text(encoding="utf-8"))
        except ValueError:
            return f"{config.name} is cut short"
        if not config.with_name(ADAPTER_SAFE_WEIGHTS_NAME).is_file():
            return f"{ADAPTER_SAFE_WEIGHTS_NAME} is missing"
    # Those of an adapter with a name lie in a folder of this name.
    for file in sorted(checkpoint.glob("**/*.safetensors")):
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
