"""Choice of the checkpoint to resume from, and checks that no earlier run is resumed or overwritten by accident."""

import json
import logging
from pathlib import Path

from ..processes import gather, is_distributed, on_main_process
from .integrity import (
    MODEL_FILES,
    TRAINER_STATE_NAME,
    find_checkpoint_error,
    get_last_complete_checkpoint,
    list_checkpoints,
    validate_checkpoint,
)

logger = logging.getLogger(__name__)


def require_last_complete_checkpoint(folder: str | Path) -> Path:
    """As `get_last_complete_checkpoint`.

    Raises:
        ValueError: There is none.
    """
    checkpoint = get_last_complete_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(
            f"There is no complete checkpoint in {folder} to resume from. Pass `resume_from_checkpoint=auto` to start "
            "from scratch in that case, or the `output_dir` of the run that is to be resumed."
        )
    return checkpoint


def resolve_resume_checkpoint(resume_from_checkpoint: str, folder: str | Path) -> str | None:
    """Return the checkpoint to resume from: a path, or the latest complete one in the output folder.

    With several processes, the main one chooses, and all of them check that the checkpoint is complete for them: with
    separate disks it may not be. A collective operation.

    Args:
        resume_from_checkpoint: A path; `last` (or `true`); or `auto`, which returns None if there is no checkpoint, so
            that a command can be repeated until the run is finished.
        folder: The output folder.

    Raises:
        ValueError: There is none, or the one that is passed or chosen is incomplete, in any process.
    """
    wanted = resume_from_checkpoint.lower()
    if wanted in ("auto", "last", "true"):
        choose = get_last_complete_checkpoint if wanted == "auto" else require_last_complete_checkpoint
        # The name, as each process may have an output folder of its own.
        name = on_main_process(lambda: None if (chosen := choose(folder)) is None else chosen.name)
        checkpoint = None if name is None else str(Path(folder) / name)
    else:
        checkpoint = resume_from_checkpoint
    if is_distributed():
        _validate_in_all_processes(None if checkpoint is None else Path(checkpoint), Path(folder))
    elif checkpoint == resume_from_checkpoint:
        validate_checkpoint(checkpoint)
    return checkpoint


def _validate_in_all_processes(checkpoint: Path | None, folder: Path) -> None:
    """Compare what each process finds of the checkpoint that all resume from; None: they start from scratch.

    Raises:
        ValueError: In every process, if the checkpoint is incomplete or of another step in one of them.
    """
    parent = folder if checkpoint is None else checkpoint.parent
    complete = [path.name for path in list_checkpoints(parent) if find_checkpoint_error(path) is None]
    step = None
    if checkpoint is None:
        problem = complete[0] if complete else None
    else:
        problem = find_checkpoint_error(checkpoint)
        if problem is None:
            step = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    found_by_process = gather((problem, step, complete, str(parent if checkpoint is None else checkpoint)))
    expected = (None, found_by_process[0][1])
    rank = next((rank for rank, found in enumerate(found_by_process) if found[:2] != expected), None)
    if rank is None:
        return
    common = [name for name in found_by_process[0][2] if all(name in found[2] for found in found_by_process)]
    hint = f"Resume from {common[0]}, which is complete in all processes, " if common else "Copy it there, "
    hint += (
        "or start a new run in an empty folder. All processes read the checkpoint: with separate disks, train with "
        "`save_on_each_node=True`."
    )
    problem, step, _, location = found_by_process[rank]
    location += f" of process {rank} of {len(found_by_process)}"
    if checkpoint is None:
        raise ValueError(
            f"{location} contains {problem}, and the main process, without a complete checkpoint, would start from "
            f"scratch. {hint}"
        )
    problem = problem or f"it is of step {step}, and that of the main process of step {found_by_process[0][1]}"
    raise ValueError(f"{location} cannot be resumed from: {problem}. {hint}")


def check_no_existing_checkpoints(folder: str | Path) -> None:
    """Check that a new run may write to a folder.

    Raises:
        ValueError: The folder contains checkpoints of an earlier run, which a new one would mix with its own, or a
            model, which it would overwrite.
    """
    used = [checkpoint for checkpoint in list_checkpoints(folder) if find_checkpoint_error(checkpoint) is None]
    if used:
        raise ValueError(
            f"`output_dir` {folder} contains {used[0].name} of an earlier run. Resume it with "
            "`resume_from_checkpoint=last` (or auto), choose another `output_dir`, or remove the checkpoints there."
        )
    weights = next((name for name in MODEL_FILES if (Path(folder) / name).exists()), None)
    if weights is not None:
        raise ValueError(
            f"`output_dir` {folder} contains a model ({weights}), which this run would overwrite. Choose another "
            "`output_dir`, remove the model there, or pass `resume_from_checkpoint=auto` to train again over it."
        )


def warn_about_newer_checkpoints(checkpoint: Path) -> None:
    """Warn about complete checkpoints after the one that is resumed from, which `last` would resume from next time."""
    checkpoints = list_checkpoints(checkpoint.parent)
    newer = checkpoints[: checkpoints.index(checkpoint)] if checkpoint in checkpoints else []
    newer = [path.name for path in newer if find_checkpoint_error(path) is None]
    if newer:
        logger.warning(
            "After %s, %s contains %s. These are overwritten when the run reaches their steps. Remove them if the "
            "settings changed, as resuming from the last checkpoint would use them.",
            checkpoint.name, checkpoint.parent, ", ".join(newer),
        )  # fmt: skip
