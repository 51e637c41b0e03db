"""Output of a training forward pass, and the context that its layers share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from ..horizontal import HorizontalMixRecord
from ..vertical import VerticalMemory

# Mixing metrics that are means over images. The others are sums over images.
AVERAGED_METRICS = ("classification_loss", "difficulty", "scorenet_loss", "target_entropy")
# Numbers of images of which the fraction among all images is logged too, by name of the fraction.
_IMAGE_FRACTIONS = (("easy_fraction", "easy_samples"), ("mixed_fraction", "mixed_samples"))
# Metrics that are ratios of two sums, by name.
_FRACTIONS = (
    ("replaced_fraction", "replaced_tokens", "mixed_sample_tokens"),
    ("label_mass_moved", "partner_label_weight", "mixed_samples"),
    ("saliency_gain", "saliency_gain", "easy_samples"),
    ("random_saliency_gain", "random_saliency_gain", "easy_samples"),
)
_FRACTION_TERMS = ("mixed_sample_tokens", "partner_label_weight", "saliency_gain", "random_saliency_gain")


@dataclass
class TokenMixupOutput(ImageClassifierOutput):
    """Output of a training forward pass with labels. In evaluation mode, the model returns the base model's output.

    Attributes:
        loss: () cross-entropy with the mixed targets plus `scorenet_loss_weight` times `scorenet_loss`.
        logits: (B, C) class scores.
        targets: (B, C) class distributions after mixing.
        scorenet_loss: () cross-entropy of ScoreNet, summed over horizontal layers; None without horizontal layers.
        scorenet_logits: class scores (B, C) of ScoreNet for each horizontal layer.
        horizontal: record of each horizontal layer.
        mixing_metrics: scalar tensors () for logging, on the device of the model. `classification_loss` (nats) is the
            cross-entropy with the mixed targets, and `target_entropy` (nats) the mean entropy of these targets.
            Horizontal layers give `scorenet_loss` (nats), the sum over these layers, and as means over these layers:
            `difficulty` (nats), and the sums over the batch `easy_samples`, `mixed_samples`, `replaced_tokens`,
            `mixed_sample_tokens` (all patch tokens of mixed images), `partner_label_weight`, and `saliency_gain` and
            `random_saliency_gain` of easy images. Vertical layers give `vertical_tokens`, the number of tokens
            collected in the batch. `hf_tokenmixup.models.outputs.summarize_mixing_metrics` computes fractions.
    """

    targets: torch.Tensor | None = None
    scorenet_loss: torch.Tensor | None = None
    scorenet_logits: tuple[torch.Tensor, ...] | None = None
    horizontal: tuple[HorizontalMixRecord, ...] | None = None
    mixing_metrics: dict[str, torch.Tensor] | None = None


class ManifoldMixupParams(NamedTuple):
    """Random parameters of manifold mixup for one forward pass. As tensors, they need only one compiled graph.

    Attributes:
        position: () int64 index into `manifold_mixup_layers`, the layer whose input is mixed.
        lam: () weight of each image in [0, 1].
        partner: (B,) int64 index of the partner, a permutation.
    """

    position: torch.Tensor
    lam: torch.Tensor
    partner: torch.Tensor

    @classmethod
    def sample(cls, num_layers: int, alpha: float, batch: int, device: torch.device) -> "ManifoldMixupParams":
        """Draw the layer uniformly, lambda from Beta(alpha, alpha), and a random permutation.

        Args:
            num_layers: number of layers to choose from.
            alpha: parameter of the Beta distribution.
            batch: B.
            device: device of the tensors.
        """
        # Draws from the CPU generator, without validation of the arguments, avoid device synchronizations.
        position = torch.randint(num_layers, ())
        lam = torch.distributions.Beta(float(alpha), float(alpha), validate_args=False).sample()
        partner = torch.randperm(batch, device=device)
        return cls(position.to(device, non_blocking=True), lam.to(device, non_blocking=True), partner)


class TokenMixupContext:
    """Context that is passed from layer to layer in a training forward pass, and discarded afterwards.

    This is no dataclass, since FSDP copies dataclass arguments to move their tensors.

    Args:
        layers: all transformer layers, for the attention rollout.
        memory: tokens collected for vertical layers.
        targets: (B, C) class distributions before mixing.
        labels: (B,) int64 class indices of the targets; None if they are other distributions.

    Attributes:
        targets: (B, C) class distributions after the mixing so far.
        labels: (B,) int64 class indices of the targets until they are mixed; then None.
        saliency: (B, T) saliency of the gradient detector, mixed together with the tokens; None for other detectors.
        manifold: parameters of manifold mixup; None if it is off.
        scorenet_losses: loss (B,) of ScoreNet for each horizontal layer so far.
        horizontal_records: record of each horizontal layer so far.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        memory: VerticalMemory,
        targets: torch.Tensor,
        labels: torch.Tensor | None = None,
    ):
        self.layers = layers
        self.memory = memory
        self.targets = targets
        self.labels = labels
        self.saliency: torch.Tensor | None = None
        self.manifold: ManifoldMixupParams | None = None
        self.scorenet_losses: list[torch.Tensor] = []
        self.horizontal_records: list[HorizontalMixRecord] = []

    def compute_mixing_metrics(self, losses: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the scalar tensors for logging, see `TokenMixupOutput`. They stay on the device.

        Args:
            losses: (B,) cross-entropy with the mixed targets.
        """
        with torch.no_grad():
            # A class index has an entropy of 0.
            entropy = torch.special.entr(self.targets).sum(dim=1) if self.labels is None else torch.zeros_like(losses)
            rows = {"classification_loss": losses, "target_entropy": entropy}
            if self.horizontal_records:
                rows |= self._horizontal_metric_rows()
            # One stack and one sum for all metrics: many small kernels would cost more than the mixing.
            sums = torch.stack([row.to(losses.dtype) for row in rows.values()]).sum(dim=1)
            means = sums / len(losses)
            metrics = {name: (means if name in AVERAGED_METRICS else sums)[index] for index, name in enumerate(rows)}
            if self.memory.num_tokens:
                metrics["vertical_tokens"] = self.targets.new_full((), len(self.targets) * self.memory.num_tokens)
        return metrics

    def _horizontal_metric_rows(self) -> dict[str, torch.Tensor]:
        """Return the metrics of horizontal layers as rows (B,), before the reduction over the batch."""
        records = self.horizontal_records
        num_tokens = records[0].replaced.shape[1]
        replaced = [record.replaced.sum(dim=1, dtype=torch.float32) for record in records]
        mixed = _mean([number.sign() for number in replaced])
        difficulty = _mean([record.difficulty for record in records])
        return {
            "difficulty": difficulty,
            "scorenet_loss": difficulty if len(records) == 1 else difficulty * len(records),
            "easy_samples": _mean([record.statistics.is_easy for record in records]),
            "mixed_samples": mixed,
            "replaced_tokens": _mean(replaced),
            "mixed_sample_tokens": mixed * num_tokens,
            "partner_label_weight": _mean([record.statistics.partner_weight for record in records]),
            "saliency_gain": _mean([record.statistics.gain for record in records]),
            "random_saliency_gain": _mean([record.statistics.random_gain for record in records]),
        }


def _mean(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return rows[0] if len(rows) == 1 else torch.stack(list(rows)).mean(dim=0)


def summarize_mixing_metrics(sums: Mapping[str, float], num_images: float, num_steps: float) -> dict[str, float]:
    """Metrics of an optimizer step for the log, averaged over steps.

    Args:
        sums: sums over forward passes of `TokenMixupOutput.mixing_metrics`. Those that are means over images
            (`AVERAGED_METRICS`) are multiplied by the number of images before.
        num_images: number of images in these forward passes.
        num_steps: number of optimizer steps.

    Returns:
        `AVERAGED_METRICS` as means over images; the numbers `easy_samples`, `mixed_samples`, `replaced_tokens` and
        `vertical_tokens` per step; and the fractions `easy_fraction` and `mixed_fraction` (among all images),
        `replaced_fraction` (replaced tokens among the tokens of mixed images) and `label_mass_moved` (mean weight of
        the partner's label in mixed images). `saliency_gain` and `random_saliency_gain` are means over easy images. A
        mean over no images is missing.
    """
    metrics = {
        name: total / (max(1, num_images) if name in AVERAGED_METRICS else num_steps)
        for name, total in sums.items()
        if name not in _FRACTION_TERMS
    }
    for name, count in _IMAGE_FRACTIONS:
        if count in sums:
            metrics[name] = sums[count] / max(1, num_images)
    for name, numerator, denominator in _FRACTIONS:
        if numerator in sums and sums.get(denominator):
            metrics[name] = sums[numerator] / sums[denominator]
    return metrics
