"""Output of a training forward pass, and the context that its layers share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from ..horizontal import HorizontalMixRecord
from ..vertical import VerticalMemory

# Mixing metrics that are means over images. The others are sums over images.
AVERAGED_METRICS = ("difficulty", "scorenet_loss")


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
        mixing_metrics: scalar tensors for logging, on the device of the model. Horizontal layers give `scorenet_loss`,
            and the means over these layers of `easy_samples`, `mixed_samples`, `replaced_tokens` (number in the batch)
            and `difficulty` (nats). Vertical layers give `vertical_tokens`, the number of tokens collected in the
            batch.
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

    Attributes:
        targets: (B, C) class distributions after the mixing so far.
        saliency: (B, T) saliency of the gradient detector, mixed together with the tokens; None for other detectors.
        manifold: parameters of manifold mixup; None if it is off.
        scorenet_losses: loss (B,) of ScoreNet for each horizontal layer so far.
        horizontal_records: record of each horizontal layer so far.
    """

    def __init__(self, layers: Sequence[nn.Module], memory: VerticalMemory, targets: torch.Tensor):
        self.layers = layers
        self.memory = memory
        self.targets = targets
        self.saliency: torch.Tensor | None = None
        self.manifold: ManifoldMixupParams | None = None
        self.scorenet_losses: list[torch.Tensor] = []
        self.horizontal_records: list[HorizontalMixRecord] = []

    def compute_mixing_metrics(self) -> dict[str, torch.Tensor]:
        """Compute the scalar tensors for logging, see `TokenMixupOutput`. They stay on the device."""
        metrics = {}
        if self.horizontal_records:
            records = self.horizontal_records
            replaced = torch.stack([record.replaced for record in records])  # (layers, B, T)
            metrics["scorenet_loss"] = torch.stack(self.scorenet_losses).detach().mean(dim=1).sum()
            metrics["easy_samples"] = torch.stack([record.easy for record in records]).sum() / len(records)
            metrics["mixed_samples"] = replaced.any(dim=2).sum() / len(records)
            metrics["replaced_tokens"] = replaced.sum() / len(records)
            metrics["difficulty"] = torch.stack([record.difficulty for record in records]).mean()
        if self.memory.num_tokens:
            metrics["vertical_tokens"] = self.targets.new_full((), len(self.targets) * self.memory.num_tokens)
        return metrics
