"""What a training was going to do when a checkpoint was written, and what it says where that is resumed otherwise.

The host resumes at a step, with the optimizer and the schedule of the checkpoint: where a step has other images,
epochs would be left out or seen twice, and another learning rate would be passed over.
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

NEW_RUN_HINT = "Or begin a new training from the checkpoint's weights, by --model_name_or_path."


def training_fingerprint(trainer: "TokenMixupTrainer") -> dict[str, Any]:
    """What a checkpoint keeps of a run's settings, as JSON has it."""
    args, model = trainer.args, trainer.classifier_model
    optimization = optimization_settings(trainer)
    names = [field.name for field in dataclasses.fields(TokenMixupConfigMixin)]
    settings = {name: getattr(model.config, name) for name in names if hasattr(model.config, name)}
    plan = {
        "images_per_step": images_per_step(trainer),
        "learning_rate": optimization.get("learning_rate"),
        "weight_decay": optimization.get("weight_decay"),
        "settings": settings | get_adapter_hyperparameters(model),
        "step_split": [args.world_size, args.train_batch_size, args.gradient_accumulation_steps],
        "readers": [args.world_size, args.dataloader_num_workers],
    }
    return json.loads(json.dumps(plan))


def check_resume_compatibility(then: Mapping[str, Any], now: Mapping[str, Any], step: int, streamed: bool) -> None:
    """Compare a training's plan with that of the checkpoint it is resumed from; tell of what it takes otherwise.

    Args:
        then: what :func:`training_fingerprint` gave when the checkpoint was written.
        now: what it gives now.
        step: that of the checkpoint.
        streamed: whether the images come as a stream.

    Raises:
        ValueError: other images per step, another learning rate or weight decay.
    """
    if then["images_per_step"] != now["images_per_step"]:
        raise ValueError(
            f"The checkpoint of step {step} comes from steps of {then['images_per_step']} images, and here they have "
            f"{now['images_per_step']}: at that step the images would be others, and epochs left out or seen twice. "
            "Resume with the same product of --per_device_train_batch_size, --gradient_accumulation_steps and "
            f"processes. {NEW_RUN_HINT}"
        )
    for name in ("learning_rate", "weight_decay"):
        if then[name] != now[name]:
            raise ValueError(
                f"The optimizer of step {step} continues with the `{name}` it had, {_text(then[name])}, and not with "
                f"{_text(now[name])}: resume with {_text(then[name])}. {NEW_RUN_HINT}"
            )
    old, new = then["settings"], now["settings"]
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if changed:
        logger.warning(
            "From step %d on, the training has other settings than before, and its model card tells the new ones: %s.",
            step,
            ", ".join(f"{name} {new.get(name)} (was {old.get(name)})" for name in changed),
        )
    # Checkpoints of earlier versions do not hold it.
    split = then.get("step_split", now["step_split"])
    if split != now["step_split"]:
        logger.warning(
            "The %d images of a step were split into %d processes x %d images x %d micro-batches and are now split "
            "into %d x %d x %d. TokenMixup, mixup and CutMix mix the images within a micro-batch, and each process "
            "draws its own random numbers: from step %d on, the run is not the one that would have continued. Resume "
            "with the same split to continue it exactly.",
            now["images_per_step"],
            *split,
            *now["step_split"],
            step,
        )
    if streamed and then["readers"] != now["readers"]:
        logger.warning(
            "The stream was read by %d processes with %d workers each and now is by %d with %d: what is left of the "
            "epoch comes in another order, in which some images come twice and some not at all.",
            *then["readers"],
            *now["readers"],
        )


def check_steps_left(state: TrainerState) -> None:
    """Check that a resumed run has steps left, or ends at the step of its checkpoint.

    Raises:
        ValueError: The checkpoint is from a later step than the last of this run.
    """
    if state.global_step > state.max_steps:
        raise ValueError(
            f"The checkpoint of step {state.global_step} lies beyond the {state.max_steps} steps of this training, so "
            "nothing is left to train: raise --num_train_epochs or --max_steps, or resume from an earlier checkpoint."
        )


def _text(value: float | str | None) -> str:
    return f"{value:g}" if isinstance(value, float | int) else str(value)
