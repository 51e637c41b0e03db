"""Cross-entropy and its reduction over a batch or over a complete optimizer step."""

import torch
import torch.nn.functional as F


def cross_entropy_loss(
    logits: torch.Tensor, targets: torch.Tensor, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy in float32, reduced over the batch.

    Args:
        logits: (B, C) class scores.
        targets: class indices (B,) or class distributions (B, C).
        num_items: divisor of the summed loss, see `reduce_loss`.

    Returns:
        () loss in nats.
    """
    reduction = "mean" if num_items is None else "sum"
    return reduce_loss(F.cross_entropy(logits.float(), targets, reduction=reduction), num_items)


def reduce_loss(losses: torch.Tensor, num_items: torch.Tensor | int | None = None) -> torch.Tensor:
    """Reduce the losses of a batch.

    Args:
        losses: (B,) loss of each image, or their sum ().
        num_items: number of images in the optimizer step, `num_items_in_batch` of `Trainer`; None: mean over the
            batch. A tensor () or (1,) stays on its device.

    Returns:
        () loss.
    """
    if num_items is None:
        return losses.mean()
    if torch.is_tensor(num_items):
        num_items = num_items.to(losses.device).flatten()[0]
    return losses.sum() / num_items
