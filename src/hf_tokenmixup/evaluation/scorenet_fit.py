"""Fit of a ScoreNet alone on the features of a frozen layer, to forecast which images are easy."""

import torch

from ..functional import difficulty

FIT_STEPS = 50
# The product of the learning rate and the number of features: a step changes a logit by about this much at most.
LOGIT_STEP = 0.3


def fit_scorenet_difficulty(
    features: torch.Tensor, targets: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Fit a linear classifier on half of the images, and measure the difficulty of the other half, Eq. (1).

    The classifier starts at zero, where each difficulty is ln C for class indices, and is trained with AdamW on all
    features at once. The step with the lowest mean difficulty counts: more steps learn these few images by heart, and
    in training, ScoreNet sees many more.

    Args:
        features: (n, D) pooled tokens, without gradient.
        targets: (n, C) class distributions.
        generator: random number generator on the CPU that draws the halves; None uses torch's default generator.

    Returns:
        (n - n // 2,) difficulty of the images that were not fitted, in nats.

    Raises:
        ValueError: There are fewer than two images.
    """
    if len(features) < 2:
        raise ValueError(f"The fit of a ScoreNet needs at least 2 images, got {len(features)}.")
    order = torch.randperm(len(features), generator=generator).to(features.device)
    fitted, measured = order[: len(order) // 2], order[len(order) // 2 :]
    mean, std = features[fitted].mean(dim=0), features[fitted].std(dim=0, correction=0)
    features = (features - mean) / torch.where(std > 0, std, 1.0)
    weight = features.new_zeros(targets.shape[1], features.shape[1], requires_grad=True)
    bias = features.new_zeros(targets.shape[1], requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=LOGIT_STEP / features.shape[1])
    best = difficulty(features[measured] @ weight.detach().T + bias.detach(), targets[measured])
    for _ in range(FIT_STEPS):
        with torch.enable_grad():
            loss = difficulty(features[fitted] @ weight.T + bias, targets[fitted]).mean()
            weight.grad, bias.grad = torch.autograd.grad(loss, (weight, bias))
        optimizer.step()
        with torch.no_grad():
            current = difficulty(features[measured] @ weight.T + bias, targets[measured])
        if current.mean() < best.mean():
            best = current
    return best
