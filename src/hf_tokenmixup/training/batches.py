"""Batches of a run: labels, sizes and memory format."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import has_length

from ..data import DeviceTransform
from .effective_settings import is_compiled
from .memory_format import channels_last, mark_dynamic_batch_size

logger = logging.getLogger(__name__)


def pop_labels(inputs: dict[str, Any]) -> Tensor:
    """Remove the labels (B,) from a batch and return them.

    Raises:
        ValueError: There are none, or they are not class indices.
    """
    labels = inputs.pop("labels", None)
    if labels is None:
        raise ValueError(
            f"A batch must hold `labels`, got {', '.join(inputs) or 'nothing'}. Rename the dataset's label column "
            "or collate the batch with a `data_collator`."
        )
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            f"`labels` must be class indices of shape (B,), got {labels.dtype} of shape {tuple(labels.shape)}. "
            "Mixup, CutMix and label smoothing are applied by the trainer: set them in its arguments."
        )
    if len(labels) == 0:
        raise ValueError("A batch must have at least one image, got none: check the sampler and the dataset.")
    return labels


def normalize_images(inputs: dict[str, Any], device_transform: DeviceTransform | None) -> dict[str, Any]:
    """Normalize 8-bit images of a batch.

    Raises:
        ValueError: The images have 8 bits, and there is no `device_transform`.
    """
    pixel_values = inputs.get("pixel_values")
    if torch.is_tensor(pixel_values) and pixel_values.dtype == torch.uint8:
        if device_transform is None:
            raise ValueError(
                "`pixel_values` have 8 bits and are not normalized. Pass `device_transform` to the trainer (the "
                "training transform of `build_transforms` has it), or normalize the images in the dataset."
            )
        inputs["pixel_values"] = device_transform.normalize(pixel_values)
    return inputs


def prepare_for_model(trainer: Trainer, inputs: dict[str, Any], labels: Tensor) -> None:
    """Set the memory format of a batch, and the sizes that a compiler must not specialize on."""
    args = trainer.args
    if args.channels_last:
        inputs["pixel_values"] = channels_last(inputs["pixel_values"])
    if is_compiled(trainer.accelerator) and not (args.dataloader_drop_last and trainer.model.training):
        mark_dynamic_batch_size(inputs["pixel_values"], labels)


def num_real_samples(trainer: Trainer, num_images: int) -> int:
    """Return how many images of an evaluation batch count.

    With several processes, accelerate pads the last batch with images of the beginning.
    """
    data = trainer.accelerator.gradient_state
    if not data.end_of_dataloader or data.remainder < 1:
        return num_images
    num_real = data.remainder - trainer.accelerator.process_index * num_images
    # Where there are none, Trainer drops the loss of the batch.
    return num_real if 0 < num_real < num_images else num_images


def validate_num_batches(trainer: Trainer, num_batches: int) -> None:
    """Check the number of batches that this process has in an epoch.

    Raises:
        ValueError: There are none.
    """
    args = trainer.args
    if num_batches == 0:
        images = len(trainer.train_dataset) if has_length(trainer.train_dataset) else "too few"
        each = f" in each of {args.world_size} processes" if args.world_size > 1 else ""
        raise ValueError(
            f"An epoch has no complete batch: `train_dataset` has {images} images, and a batch "
            f"{trainer._train_batch_size}{each}. Lower `per_device_train_batch_size`, or set "
            "`dataloader_drop_last=False`."
        )
    if num_batches < args.gradient_accumulation_steps:
        logger.warning(
            "`gradient_accumulation_steps` is %d, but an epoch has %d batches: an optimizer step takes these.",
            args.gradient_accumulation_steps,
            num_batches,
        )


def warn_about_half_precision_weights(model: nn.Module) -> None:
    """Warn if weights that are trained are in half precision."""
    half = {
        str(weight.dtype).removeprefix("torch.")
        for weight in model.parameters()
        if weight.requires_grad and weight.itemsize < 4
    }
    if half:
        logger.warning(
            "The weights are in %s and are trained in it: small updates are lost. Load the model with "
            "dtype=torch.float32; bf16 or fp16 in the training arguments compute in half precision by autocast.",
            " and ".join(sorted(half)),
        )


def half_precision_eval_dtype(trainer: Trainer) -> torch.dtype | None:
    """Return the dtype of the weights in an evaluation after training with `bf16_full_eval` or `fp16_full_eval`."""
    args = trainer.args
    if trainer.is_in_train or not (args.bf16_full_eval or args.fp16_full_eval):
        return None
    return torch.float16 if args.fp16_full_eval else torch.bfloat16
