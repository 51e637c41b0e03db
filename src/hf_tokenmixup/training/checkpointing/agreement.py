"""What all processes of a run must agree on, before training and before the best model is loaded."""

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers.trainer_utils import SaveStrategy, has_length

from ..processes import check_equal, folder_is_shared, gather, is_distributed, on_all_processes
from .integrity import validate_checkpoint

if TYPE_CHECKING:
    from ..trainer import TokenMixupTrainer

logger = logging.getLogger(__name__)


def validate_processes_agree(trainer: "TokenMixupTrainer") -> None:
    """Compare what must be the same in all processes: the training images and, for checkpoints, the output folder.

    Raises:
        ValueError: The datasets have other images or lengths. Several processes would write the same checkpoint, or
        the
            best one could not be read by all.
    """
    if not is_distributed():
        return
    args, folder = trainer.args, trainer.args.output_dir
    if has_length(trainer.train_dataset):
        found = {"the number of images": len(trainer.train_dataset)}
        labels = getattr(trainer.train_dataset, "labels", None)
        if isinstance(labels, np.ndarray):
            digest = hashlib.blake2b(np.ascontiguousarray(labels), digest_size=8).hexdigest()
            found["the digest of the labels"] = digest
        check_equal("The training dataset", found, "Give all processes the same files, in the same order.")
    if args.save_strategy == SaveStrategy.NO:
        return
    shared, num_writers = folder_is_shared(folder), sum(gather(args.should_save))
    if shared and num_writers > 1:
        raise ValueError(
            f"`save_on_each_node=True`, but all processes share {folder}, where {num_writers} of them would write the "
            "same files. Set `save_on_each_node=False`, or give each machine a folder on its own disk."
        )
    if shared or args.save_on_each_node:
        return
    found = (
        f"The output folder of the main process, {gather(str(folder))[0]}, is not that of all processes, as with "
        "separate disks or where each process chooses its own name"
    )
    hint = "Set `save_on_each_node=True`, or choose a folder that all processes share."
    if args.load_best_model_at_end:
        raise ValueError(f"{found}: only some could load the best model at the end. {hint}")
    if args.should_log:
        logger.warning("%s: no run can be resumed from its checkpoints. %s", found, hint)


def validate_best_checkpoint(trainer: "TokenMixupTrainer") -> None:
    """Check that all processes can load the same best model.

    Raises:
        ValueError: They have other best checkpoints, or one of them cannot read it.
    """
    if not is_distributed():
        return
    best = trainer.state.best_model_checkpoint
    hint = "All processes load the best model: resume with a folder that all of them share."
    check_equal("The best checkpoint", {"its name": None if best is None else Path(best).name}, hint)
    if best is not None:
        on_all_processes(lambda: validate_checkpoint(best))
