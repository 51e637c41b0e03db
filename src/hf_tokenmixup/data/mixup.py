"""Mixup, CutMix and label smoothing of input batches.

- mixup: Beyond Empirical Risk Minimization (Zhang et al., 2018)
- CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features (Yun et al., 2019)

The implementation is `timm.data.Mixup`. TokenMixup mixes tokens afterwards, with the resulting class distributions as
its labels.
"""

import math

import torch
from timm.data.mixup import Mixup, mixup_target

MIXUP_MODES = ("batch", "pair", "elem")


class InputMixup:
    """Mixup, CutMix and label smoothing. Image i is mixed with image B-1-i.

    timm draws from numpy's global generator, which `transformers.set_seed` seeds and checkpoints of `Trainer` store.

    Args:
        num_classes: C.
        mixup_alpha: mixup draws lambda from Beta(alpha, alpha); 0 turns mixup off.
        cutmix_alpha: CutMix draws the fraction of the area from Beta(alpha, alpha); 0 turns CutMix off.
        prob: probability of mixing, per draw.
        switch_prob: probability of CutMix instead of mixup, if both are on.
        mode: one draw per `batch` (no device synchronization), per `pair`, or per image (`elem`).
        label_smoothing: e; the label gets the probability 1 - e + e/C, and the other classes e/C.

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        label_smoothing: float = 0.0,
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}.")
        for name, value in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0 (0: off), got {value}.")
        for name, value in (("prob", prob), ("switch_prob", switch_prob)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be a probability between 0 and 1, got {value}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}.")
        if mode not in MIXUP_MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MIXUP_MODES))}, got {mode!r}.")
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self._mixup = None
        if prob > 0 and (mixup_alpha > 0 or cutmix_alpha > 0):
            self._mixup = Mixup(
                mixup_alpha=mixup_alpha,
                cutmix_alpha=cutmix_alpha,
                prob=prob,
                switch_prob=switch_prob,
                mode=mode,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )

    @property
    def enabled(self) -> bool:
        """Whether mixup, CutMix or label smoothing is on. Otherwise a call only converts labels to one-hot rows."""
        return self._mixup is not None or self.label_smoothing > 0

    def __call__(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix a batch. The arguments are not changed.

        Args:
            pixel_values: (B, 3, H, W) floating-point images on any device.
            labels: (B,) int64 class indices. They are not validated, which would synchronize the device.

        Returns:
            Images (B, 3, H, W) in the same dtype, and class distributions (B, C) in float32.

        Raises:
            ValueError: if the shapes are invalid.
        """
        if pixel_values.ndim != 4 or labels.ndim != 1 or len(pixel_values) != len(labels):
            raise ValueError(
                "Expected pixel_values (B, 3, H, W) and labels (B,), got "
                f"{tuple(pixel_values.shape)} and {tuple(labels.shape)}."
            )
        if self._mixup is None:
            return pixel_values, mixup_target(labels, self.num_classes, 1.0, self.label_smoothing)
        size = len(labels)
        # timm mixes in place and rounds the lambda of each image to the dtype of the images, so use a float32 copy.
        images = pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32), copy=True)
        if size % 2:
            # timm requires an even batch size, so the last image is duplicated and the copy is dropped afterwards.
            images, labels = torch.cat([images, images[-1:]]), torch.cat([labels, labels[-1:]])
        images, targets = self._mixup(images, labels)
        return images[:size].to(pixel_values.dtype), targets[:size].float()
