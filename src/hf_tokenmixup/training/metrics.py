"""Metrics of TokenMixup for the log: of full optimizer steps, over micro-batches and processes."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..models import AVERAGED_METRICS, summarize_mixing_metrics


class MixingMetrics:
    """Accumulates the metrics of forward passes on the device, to avoid a synchronization per step.

    Samples and tokens are summed over the micro-batches and processes of a step and averaged over steps; losses and
    difficulties (`AVERAGED_METRICS`) are averaged over all images.

    Example:
        metrics = MixingMetrics()
        for batch in train_dataloader:
            outputs = model(**batch)
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            metrics.update(outputs.mixing_metrics, num_images=len(outputs.logits))
            metrics.step()
        print(metrics.compute())
    """

    def __init__(self) -> None:
        # Metrics are stacked, since an addition for each would be many small kernels.
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._images = 0
        self._steps = 0

    def update(self, values: Mapping[str, Tensor], num_images: int) -> None:
        """Add the metrics of a forward pass: scalars (), or (R,) for the R replicas of a DataParallel."""
        if num_images == 0:
            # The mean over no images is NaN.
            return
        for averaged, names in _group(values):
            rows = [values[name].detach().float() for name in names]
            if rows[0].ndim:
                rows = [row.mean() if averaged else row.sum() for row in rows]
            sums = torch.stack(rows) * num_images if averaged else torch.stack(rows)
            self._sums[names] = self._sums[names] + sums if names in self._sums else sums
        self._images += num_images

    def step(self) -> None:
        """End an optimizer step, after its last micro-batch."""
        self._steps += 1

    def compute(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Return the metrics of a step, averaged over all steps, see `summarize_mixing_metrics`; empty without steps.

        Args:
            accelerator: Sums over its processes, so that all of them must call this. None: this process alone.
        """
        return self.totals(accelerator).summarize()

    def totals(self, accelerator: Accelerator | None = None) -> "MixingTotals":
        """Return the totals over all steps; `accelerator` as in `compute`."""
        totals = self._totals(accelerator)
        return MixingTotals(**totals, steps=self._steps)

    def state_dict(self, accelerator: Accelerator) -> dict[str, Any]:
        """Return the sums since the last log line as JSON values. A collective operation."""
        return self._totals(accelerator) | {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any], accelerator: Accelerator) -> None:
        """Load what `state_dict` returned: the first process gets all of it, as it has the sums over processes."""
        factor = 1 if accelerator.is_main_process else 0
        self._sums = {
            names: torch.tensor([state["sums"][name] * factor for name in names], device=accelerator.device)
            for _, names in _group(state["sums"])
        }
        self._images, self._steps = int(state["images"]) * factor, state["steps"]

    def _totals(self, accelerator: Accelerator | None) -> dict[str, Any]:
        """Return the sums over all processes, or over this one without accelerator, read from the device."""
        if not self._sums:
            return {"sums": {}, "images": 0}
        sums = torch.cat(list(self._sums.values()))
        sums = torch.cat([sums, sums.new_tensor([self._images])])
        if accelerator is not None:
            sums = accelerator.reduce(sums, reduction="sum")
        *values, images = sums.tolist()
        totals: dict[str, float] = {}
        for name, value in zip((name for names in self._sums for name in names), values, strict=True):
            totals[name] = totals.get(name, 0.0) + value
        return {"sums": dict(sorted(totals.items())), "images": images}


@dataclass
class MixingTotals:
    """Sums of metrics over steps and processes, read from the device.

    Attributes:
        sums: sums by name, see `hf_tokenmixup.models.summarize_mixing_metrics`.
        images: number of images.
        steps: number of optimizer steps.
        complete: whether all steps of the run are included. Checkpoints of earlier versions have no totals.
    """

    sums: dict[str, float] = field(default_factory=dict)
    images: float = 0
    steps: int = 0
    complete: bool = True

    def __add__(self, other: "MixingTotals") -> "MixingTotals":
        names = self.sums.keys() | other.sums.keys()
        sums = {name: self.sums.get(name, 0.0) + other.sums.get(name, 0.0) for name in sorted(names)}
        complete = self.complete and other.complete
        return MixingTotals(sums, self.images + other.images, self.steps + other.steps, complete)

    def summarize(self) -> dict[str, float]:
        """Return the metrics of a step, averaged over all steps; empty if there were none."""
        return summarize_mixing_metrics(self.sums, self.images, self.steps) if self.steps else {}

    def run_metrics(self) -> dict[str, float]:
        """Return the fractions of a complete run by the names that `Trainer` gives to its results."""
        metrics = self.summarize()
        names = ("mixed_fraction", "easy_fraction", "replaced_fraction", "label_mass_moved", "difficulty")
        return {f"train_{name}": metrics[name] for name in names if name in metrics}


def _group(names: Iterable[str]) -> Iterator[tuple[bool, tuple[str, ...]]]:
    """Yield the names of the metrics that are means over images, and those of the others, each in sorted order."""
    for averaged in (True, False):
        group = tuple(sorted(name for name in names if (name in AVERAGED_METRICS) == averaged))
        if group:
            yield averaged, group
