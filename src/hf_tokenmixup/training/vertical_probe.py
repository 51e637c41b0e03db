"""Measurement of the attention to collected tokens (VTM) for the log, on two images of the step that is logged."""

import logging
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..evaluation.vertical_attention import vertical_attention

logger = logging.getLogger(__name__)

NUM_IMAGES = 2
# As a multiple of uniform attention.
MIN_ATTENTION = 0.05


class VerticalProbe:
    """Measures `vertical_attention` when a log line is due, which costs one forward pass of two images.

    Args:
        enabled: whether anything is measured.
    """

    def __init__(self, enabled: bool = False) -> None:
        self._enabled = enabled
        self._images: torch.Tensor | None = None
        self._value: float | None = None
        self._warned = False

    def set_images(self, pixel_values: torch.Tensor) -> None:
        """Store copies of the first images (B, 3, H, W) of a micro-batch, so that the batch itself can be freed."""
        if self._enabled:
            self._images, self._value = pixel_values[:NUM_IMAGES].detach().clone(), None

    def measure(self, model: PreTrainedModel, accelerator: Accelerator) -> dict[str, float]:
        """Return `vertical_attention` for the log, and warn once if it is next to nothing. A collective operation.

        Args:
            model: the classifier.
            accelerator: the value is its mean over processes.
        """
        if self._images is not None:
            attention = vertical_attention(model, self._images.to(model.dtype))
            self._images = None
            if attention is not None:
                self._value = accelerator.reduce(attention.float(), reduction="mean").item()
        if self._value is None:
            return {}
        if self._value < MIN_ATTENTION and not self._warned:
            self._warned = True
            if accelerator.is_main_process:
                logger.warning(
                    "Vertical layers pay next to no attention to collected tokens: %.2g times what uniform attention "
                    "would, so VTM has no effect. Choose other `vertical_layers`, or a higher `vertical_kappa`.",
                    self._value,
                )
        return {"vertical_attention": self._value}

    def state_dict(self, model: PreTrainedModel, accelerator: Accelerator) -> dict[str, float]:
        """Return the value for a log line that is still due when a checkpoint is saved. A collective operation."""
        return self.measure(model, accelerator)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Load what `state_dict` returned."""
        self._value = state.get("vertical_attention")
