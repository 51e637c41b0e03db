"""Labels as users give them, made the class distributions that TokenMixup mixes."""

import torch

from ..functional import at_least_float32

_ROW_SUM_TOLERANCE = 1e-2  # rounding of a half-precision row


def check_label_shape(labels: torch.Tensor, batch_size: int, num_labels: int) -> None:
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


def check_label_values(labels: torch.Tensor, num_labels: int) -> None:
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


def class_distributions(labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Class indices (B,) or distributions (B, C), both checked before, as float32 (or wider) distributions (B, C)."""
    if labels.is_floating_point():
        return at_least_float32(labels)
    one_hot = torch.zeros(len(labels), num_labels, device=labels.device)
    return one_hot.scatter_(1, labels.long()[:, None], 1.0)
