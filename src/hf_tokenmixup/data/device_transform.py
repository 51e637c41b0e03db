"""Steps of the training transform that run on the device, for complete batches: normalization and random erasing.

Data loader workers then send 8-bit images, a quarter of the bytes, and do not normalize.
"""

from collections.abc import Callable, Sequence

import torch


class DeviceTransform:
    """Normalization of 8-bit images, and random erasing of mixed images.

    Args:
        mean: mean per channel of pixels in [0, 1].
        std: standard deviation per channel.
        random_erasing: function that changes normalized images (B, 3, H, W) in place, with a `device` attribute such
            as that of `timm.data.random_erasing.RandomErasing`. None: no erasing.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        random_erasing: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self._mean, self._std = torch.tensor(self.mean).view(-1, 1, 1), torch.tensor(self.std).view(-1, 1, 1)
        self._random_erasing = random_erasing

    def normalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Convert 8-bit images to normalized float32 images. Floating-point images are returned as they are.

        Args:
            pixel_values: (B, 3, H, W) or (3, H, W).
        """
        if pixel_values.dtype != torch.uint8:
            return pixel_values
        if self._mean.device != pixel_values.device:
            self._mean, self._std = self._mean.to(pixel_values.device), self._std.to(pixel_values.device)
        return pixel_values.float().div_(255).sub_(self._mean).div_(self._std)

    def erase(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Erase a rectangle of some images.

        The rectangles are drawn from Python's generator, and their content from the generator of the device.

        Args:
            pixel_values: (B, 3, H, W) normalized images. They are not changed.
        """
        if self._random_erasing is None:
            return pixel_values
        self._random_erasing.device = pixel_values.device
        return self._random_erasing(pixel_values.clone())
