"""Mixing of whole input images, before the model: label smoothing, mixup and CutMix.

- mixup: Beyond Empirical Risk Minimization (Zhang et al., 2018)
- CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features (Yun et al., 2019)

The draws and the arithmetic are those of `timm.data.Mixup`. TokenMixup then mixes tokens inside the network, and takes
the distributions that come out of here as its labels.
"""

import math

import torch
from timm.data.mixup import Mixup, mixup_target

MIXUP_MODES = ("batch", "pair", "elem")


class InputMixup:
    """Labels to distributions, and images mixed pairwise (image i with image B-1-i).

    Args:
        num_classes: C.
        mixup_alpha: Beta(alpha, alpha) gives mixup's share of an image; 0 turns mixup off.
        cutmix_alpha: the same for CutMix's share of the area; 0 turns CutMix off.
        prob: probability that mixing happens at all, per draw.
        switch_prob: probability of CutMix where both are on.
        mode: one draw per `batch` (nothing is read from or copied to the device), per `pair`, or per image (`elem`).
        label_smoothing: e; the label gets 1 - e + e/C and every other class e/C.

    timm draws from numpy's global generator, which transformers' `set_seed` seeds and the Trainer's checkpoints keep.

    Raises:
        ValueError: a setting out of its range.
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
        """Whether anything is on. If not, a call only turns labels into one-hot rows."""
        return self._mixup is not None or self.label_smoothing > 0

    def __call__(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix a batch; neither argument is changed.

        Args:
            pixel_values: (B, 3, H, W) floating point, on any device.
            labels: (B,) int64 in [0, C), not checked here (that would make the device wait).

        Returns:
            Images (B, 3, H, W) of the same dtype, and targets (B, C) float32 whose rows sum to one.

        Raises:
            ValueError: the shapes do not fit.
        """
        if pixel_values.ndim != 4 or labels.ndim != 1 or len(pixel_values) != len(labels):
            raise ValueError(
                "Expected pixel_values (B, 3, H, W) and labels (B,), got "
                f"{tuple(pixel_values.shape)} and {tuple(labels.shape)}."
            )
        if self._mixup is None:
            return pixel_values, mixup_target(labels, self.num_classes, 1.0, self.label_smoothing)
        size = len(labels)
        # timm mixes in place. In float32, because it rounds per-image shares to the dtype of the images.
        images = pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32), copy=True)
        if size % 2:
            # timm wants an even batch. With the last image doubled, its first copy mixes with image 1 and its second,
            # which is dropped again, gives image 0 its partner. A single image meets itself.
            images, labels = torch.cat([images, images[-1:]]), torch.cat([labels, labels[-1:]])
        images, targets = self._mixup(images, labels)
        return images[:size].to(pixel_values.dtype), targets[:size].float()
