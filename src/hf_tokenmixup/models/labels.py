"""Labels as users give them, made the class distributions that TokenMixup mixes."""

import torch

_ROW_SUM_TOLERANCE = 1e-2  # rounding of a half-precision row


def validate_label_shape(labels: torch.Tensor, batch_size: int, num_labels: int) -> None:
    """Raise a ``ValueError`` unless these are class indices (B,) or distributions (B, C); no value is read."""
    if labels.is_floating_point():
        if tuple(labels.shape) != (batch_size, num_labels):
            raise ValueError(
                f"labels in floating point must be distributions over the classes, shape (B, C) = "
                f"({batch_size}, {num_labels}), got {tuple(labels.shape)}. "
                "For class indices use an integer tensor of shape (B,)."
            )
    elif labels.dtype == torch.bool or labels.is_complex() or tuple(labels.shape) != (batch_size,):
        raise ValueError(
            f"labels must be class indices, integers of shape (B,) = ({batch_size},), or distributions, "
            f"({batch_size}, {num_labels}) in floating point; got {labels.dtype} of shape {tuple(labels.shape)}."
        )


def validate_label_values(labels: torch.Tensor, num_labels: int) -> None:
    """Read labels (B,) or (B, C), of a shape already checked, and raise a ``ValueError`` for impossible values."""
    if labels.is_floating_point():
        rows = labels.detach().double()
        wrong = ((rows.sum(dim=1) - 1).abs() > _ROW_SUM_TOLERANCE) | ~(rows >= 0).all(dim=1)
        if wrong.any():
            index = int(wrong.nonzero()[0])
            raise ValueError(
                f"labels in floating point must be distributions: no negative value, each row with sum one. "
                f"Row {index} has sum {rows[index].sum().item():.6g} and least value {rows[index].min().item():.6g}."
            )
        return
    wrong = (labels < 0) | (labels >= num_labels)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels must lie between 0 and {num_labels - 1} (the model has {num_labels} classes), "
            f"got {int(labels[index])} for image {index} of the batch. "
            "Set num_labels, or the label column, to fit the data."
        )


@torch.library.custom_op("hf_tokenmixup::to_soft_targets", mutates_args=())
def to_soft_targets(labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Class indices (B,) or distributions (B, C), of a shape already checked, as float32 (or wider) ones (B, C).

    An operator of its own, so that it runs as it is under ``torch.compile`` too: values on the CPU are checked every
    time, and an index out of range on an accelerator stops there instead of being written somewhere.

    Raises:
        ValueError: see :func:`validate_label_values`; on the CPU only, where nothing has to be waited for.
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
    # `len` would be a number, and so another graph for every batch size.
    return labels.new_empty((labels.shape[0], num_labels), dtype=dtype)
