"""Validate labels and convert them to class distributions."""

import torch

_ROW_SUM_TOLERANCE = 1e-2  # rounding of a half-precision row


def validate_label_shape(labels: torch.Tensor, batch_size: int, num_labels: int) -> None:
    """Validate the shape and dtype of labels without a device synchronization.

    Args:
        labels: class indices (B,) or class distributions (B, C).
        batch_size: B.
        num_labels: C.

    Raises:
        ValueError: if the shape or dtype is invalid.
    """
    if labels.is_floating_point():
        if tuple(labels.shape) != (batch_size, num_labels):
            raise ValueError(
                "labels in floating point must be class distributions of shape (B, C) = "
                f"({batch_size}, {num_labels}), got {tuple(labels.shape)}. "
                "For class indices, pass an integer tensor of shape (B,)."
            )
    elif labels.dtype == torch.bool or labels.is_complex() or tuple(labels.shape) != (batch_size,):
        raise ValueError(
            f"labels must be class indices, integers of shape (B,) = ({batch_size},), or class distributions of shape "
            f"(B, C) = ({batch_size}, {num_labels}) in floating point, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}."
        )


def validate_label_values(labels: torch.Tensor, num_labels: int) -> None:
    """Validate the values of labels. This synchronizes the device.

    Args:
        labels: class indices (B,) or class distributions (B, C) of a valid shape.
        num_labels: C.

    Raises:
        ValueError: if a class index is out of range, or a row is no distribution.
    """
    if labels.is_floating_point():
        rows = labels.detach().double()
        wrong = ((rows.sum(dim=1) - 1).abs() > _ROW_SUM_TOLERANCE) | ~(rows >= 0).all(dim=1)
        if wrong.any():
            index = int(wrong.nonzero()[0])
            raise ValueError(
                "labels in floating point must be class distributions: no negative value, and a sum of 1 in each row. "
                f"Row {index} has sum {rows[index].sum().item():.6g} and minimum "
                f"{rows[index].min().item():.6g}."
            )
        return
    wrong = (labels < 0) | (labels >= num_labels)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels must be between 0 and {num_labels - 1} (the model has {num_labels} classes), got "
            f"{int(labels[index])} for image {index} of the batch. Set num_labels to the number of classes, or choose "
            "another label column."
        )


@torch.library.custom_op("hf_tokenmixup::to_soft_targets", mutates_args=())
def to_soft_targets(labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Convert labels to class distributions.

    This is a custom operator, so `torch.compile` does not change it: values on the CPU are always validated, and an
    index out of range on an accelerator fails there.

    Args:
        labels: class indices (B,) or class distributions (B, C) of a valid shape.
        num_labels: C.

    Returns:
        (B, C) class distributions in float32 or float64.

    Raises:
        ValueError: if a value is invalid (on the CPU only), see `validate_label_values`.
    """
    if labels.device.type == "cpu":
        validate_label_values(labels, num_labels)
    if labels.is_floating_point():
        return labels.to(torch.promote_types(labels.dtype, torch.float32), copy=True)
    one_hot = torch.zeros(len(labels), num_labels, device=labels.device)
    return one_hot.scatter_(1, labels.long()[:, None], 1.0)


@to_soft_targets.register_fake
def _(labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    dtype = torch.promote_types(labels.dtype, torch.float32) if labels.is_floating_point() else torch.float32
    # `len` would be a constant, which needs a graph for each batch size.
    return labels.new_empty((labels.shape[0], num_labels), dtype=dtype)
