"""Saving of checkpoints: a checkpoint is complete or is removed, and it has the state that resuming needs."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..processes import gather, is_distributed
from .disk_space import SaveError, saving
from .integrity import (
    CALLBACK_STATE_KEY,
    TRAINER_STATE_NAME,
    find_checkpoint_error,
    list_file_sizes,
    list_incomplete_checkpoints,
    remove_checkpoint,
)

if TYPE_CHECKING:
    from ..trainer import TokenMixupTrainer


class CheckpointWriter:
    """Saves the checkpoints of a trainer.

    Args:
        trainer: The trainer whose state is saved.

    Attributes:
        current: The checkpoint with the weights as they are now; None if there is none.
    """

    def __init__(self, trainer: "TokenMixupTrainer") -> None:
        self.current: Path | None = None
        self._trainer = trainer

    def save(self, folder: Path, write: Callable[[], None]) -> None:
        """Save a checkpoint. A collective operation.

        Args:
            folder: Absolute path of the checkpoint.
            write: Writes it. Not called if the checkpoint was written or loaded since the last step: then only its
                log and the best metric have changed.

        Raises:
            SaveError: It could not be written. Nothing of it is left.
        """
        try:
            with saving(folder.name, folder.parent):
                if self._is_current(folder):
                    self._rewrite_trainer_state(folder)
                else:
                    self._clear(folder)
                    write()
                    self.current = folder
        except SaveError:
            if self._trainer.args.should_save and find_checkpoint_error(folder) is not None:
                remove_checkpoint(folder)
            raise

    def store_state(self, folder: Path) -> None:
        """Put the trainer's state, and the sizes of the checkpoint's files, where Trainer saves its own state.

        A collective operation.
        """
        trainer = self._trainer
        state = trainer.state_dict()
        # Each process has written its random state.
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            trainer.state.stateful_callbacks[CALLBACK_STATE_KEY] = {"kept": state, "files": list_file_sizes(folder)}

    def _is_current(self, folder: Path) -> bool:
        """Return whether this checkpoint has the weights as they are now, in all processes that write one."""
        args = self._trainer.args
        current = folder == self.current and (not args.should_save or find_checkpoint_error(folder) is None)
        return all(gather(current)) if is_distributed() else current

    def _clear(self, folder: Path) -> None:
        """Remove what is in the place of a new checkpoint, and incomplete ones, which Trainer would count."""
        trainer = self._trainer
        # `store_state` writes it if there is an optimizer to resume with.
        trainer.state.stateful_callbacks.pop(CALLBACK_STATE_KEY, None)
        if trainer.args.should_save:
            remove_checkpoint(folder)
            if trainer.args.save_total_limit:
                for incomplete in list_incomplete_checkpoints(folder.parent):
                    remove_checkpoint(incomplete)
        trainer.accelerator.wait_for_everyone()

    def _rewrite_trainer_state(self, folder: Path) -> None:
        state = self._trainer.state
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(folder)
        self.store_state(folder)
        if self._trainer.args.should_save:
            state.save_to_json(folder / f".{TRAINER_STATE_NAME}")
            (folder / f".{TRAINER_STATE_NAME}").replace(folder / TRAINER_STATE_NAME)


def is_checkpoint_folder(folder: str, output_dir: str) -> bool:
    """Return whether a folder has the name of a checkpoint, and is not the output folder itself."""
    name = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(folder).name)
    return Path(folder) != Path(output_dir) and name is not None


def remove_if_truncated(file: Path) -> None:
    """Remove a JSON file that an interrupted run wrote partially."""
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    except ValueError:
        file.unlink()
