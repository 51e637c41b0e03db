"""The counts of TokenMixup for the log: of whole optimizer steps, over micro-batches and processes."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..models import AVERAGED_METRICS


class MixingMetrics:
    """Adds up the counts of forwards where they are: reading them would have the device waited for.

    Samples and tokens are summed over the micro-batches and processes of a step and averaged over steps; losses and
    difficulties (`AVERAGED_METRICS`) are averaged over all images.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._images = 0
        self._steps = 0

    def add(self, counts: Mapping[str, Tensor], images: int) -> None:
        """Take the counts of a forward of so many images: scalars, or one for each replica of a DataParallel."""
        if images == 0:
            # A mean over no images is not a number.
            return
        for name, value in counts.items():
            value = value.detach().float()
            value = value.mean() * images if name in AVERAGED_METRICS else value.sum()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._images += images

    def end_step(self) -> None:
        """To be called behind the last micro-batch of an optimizer step."""
        self._steps += 1

    def summary(self, accelerator: Accelerator) -> dict[str, float]:
        """The counts of a step, averaged over all steps; nothing where none were counted. All processes call it."""
        if not self._steps:
            return {}
        totals = self._totals(accelerator)
        return {
            name: total / max(1, totals["images"] if name in AVERAGED_METRICS else self._steps)
            for name, total in totals["sums"].items()
        }

    def state_dict(self, accelerator: Accelerator) -> dict[str, Any]:
        """What a checkpoint keeps of the steps since the last log line, as JSON has it. All processes call it."""
        return self._totals(accelerator) | {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any], accelerator: Accelerator) -> None:
        """Load what `state_dict` returned. The first process has it all, as sums over processes were kept."""
        share = 1 if accelerator.is_main_process else 0
        self._sums = {
            name: torch.tensor(value * share, device=accelerator.device) for name, value in state["sums"].items()
        }
        self._images, self._steps = int(state["images"]) * share, state["steps"]

    def _totals(self, accelerator: Accelerator) -> dict[str, Any]:
        """Sums over all processes, read from the device."""
        if not self._sums:
            return {"sums": {}, "images": 0}
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        sums = accelerator.reduce(torch.cat([sums, sums.new_tensor([self._images])]), reduction="sum")
        *sums, images = sums.tolist()
        return {"sums": dict(zip(names, sums, strict=True)), "images": images}
