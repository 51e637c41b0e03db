"""Settings recorded in a checkpoint, and the checks when it is resumed with different ones.

Trainer resumes at a step, with the optimizer and the schedule of the checkpoint. If a step had other images, epochs
would be skipped or repeated, and another learning rate would be ignored.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerState

from ...configuration import TokenMixupConfigMixin
from ..effective_settings import images_per_step, optimization_settings
from ..lora import get_adapter_hyperparameters

if TYPE_CHECKING:
    from ..trainer import TokenMixupTrainer

logger = logging.getLogger(__name__)

NEW_RUN_HINT = "Or start a new run from the checkpoint's weights (`model_name_or_path`)."


def training_fingerprint(trainer: "TokenMixupTrainer") -> dict[str, Any]:
    """Return the settings of a run that a checkpoint records, as JSON values."""
    args, model = trainer.args, trainer.classifier_model
    optimization = optimization_settings(trainer)
    names = [field.name for field in dataclasses.fields(TokenMixupConfigMixin)]
    settings = {name: getattr(model.config, name) for name in names if hasattr(model.config, name)}
    recorded = {
        "images_per_step": images_per_step(trainer),
        "learning_rate": optimization.get("learning_rate"),
        "weight_decay": optimization.get("weight_decay"),
        "layer_decay": args.layer_decay,
        "settings": settings | get_adapter_hyperparameters(model),
        "step_split": [args.world_size, args.train_batch_size, args.gradient_accumulation_steps],
        "readers": [args.world_size, args.dataloader_num_workers],
    }
    return json.loads(json.dumps(recorded))


def check_resume_compatibility(
    saved: Mapping[str, Any], current: Mapping[str, Any], step: int, streamed: bool
) -> None:
    """Compare the settings of a run with those of the checkpoint that it resumes from, and warn about changes.

    Args:
        saved: What `training_fingerprint` returned when the checkpoint was written.
        current: What it returns now.
        step: Step of the checkpoint.
        streamed: Whether the images are streamed.

    Raises:
        ValueError: The images per step, the learning rate, its layer-wise decay or the weight decay differ.
    """
    if saved["images_per_step"] != current["images_per_step"]:
        raise ValueError(
            f"The checkpoint of step {step} is from steps of {saved['images_per_step']} images, and this run has "
            f"{current['images_per_step']}: epochs would be skipped or repeated. Resume with the same product of "
            f"`per_device_train_batch_size`, `gradient_accumulation_steps` and processes. {NEW_RUN_HINT}"
        )
    # Checkpoints of earlier versions have no `layer_decay`.
    saved = {"layer_decay": 1.0} | dict(saved)
    for name in ("learning_rate", "layer_decay", "weight_decay"):
        if saved[name] != current[name]:
            raise ValueError(
                f"`{name}` cannot change on resume: the optimizer of step {step} has {_text(saved[name])}, this run "
                f"has {_text(current[name])}. Resume with {_text(saved[name])}. {NEW_RUN_HINT}"
            )
    old, new = saved["settings"], current["settings"]
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if changed:
        logger.warning(
            "From step %d on, the run has other settings than before, and its model card has the new ones: %s.",
            step,
            ", ".join(f"{name} {new.get(name)} (was {old.get(name)})" for name in changed),
        )
    # Checkpoints of earlier versions do not have it.
    split = saved.get("step_split", current["step_split"])
    if split != current["step_split"]:
        logger.warning(
            "The %d images of a step were split into %d processes x %d images x %d micro-batches and are now split "
            "into %d x %d x %d. TokenMixup, mixup and CutMix mix the images within a micro-batch, and each process "
            "draws its own random numbers: from step %d on, the run is not the one that would have continued. Resume "
            "with the same split to continue it exactly.",
            current["images_per_step"],
            *split,
            *current["step_split"],
            step,
        )
    if streamed and saved["readers"] != current["readers"]:
        logger.warning(
            "The stream was read by %d processes with %d workers each, and now by %d with %d: the rest of the epoch "
            "is read in another order, with repeated and missing images.",
            *saved["readers"],
            *current["readers"],
        )


def check_steps_left(state: TrainerState) -> None:
    """Check that a resumed run has steps left, or ends at the step of its checkpoint.

    Raises:
        ValueError: The checkpoint is from a later step than the last of this run.
    """
    if state.global_step > state.max_steps:
        raise ValueError(
            f"The checkpoint is at step {state.global_step}, and this run has {state.max_steps} steps: nothing is "
            "left to train. Increase `num_train_epochs` or `max_steps`, or resume from an earlier checkpoint."
        )


def _text(value: float | str | None) -> str:
    return f"{value:g}" if isinstance(value, float | int) else str(value)
