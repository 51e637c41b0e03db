"""What travels through a training forward, and what comes out of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from ..horizontal import HorizontalMixRecord
from ..vertical import VerticalMemory

# Counts that are means over images; the others are sums over them.
AVERAGED_METRICS = ("difficulty", "scorenet_loss")


@dataclass
class TokenMixupOutput(ImageClassifierOutput):
    """Output of a training forward with labels; an evaluation forward returns what the plain model does.

    Attributes:
        loss: () cross-entropy against the mixed targets plus lambda times ``scorenet_loss``.
        logits: (B, C).
        targets: (B, C) class distributions after all mixing.
        scorenet_loss: () ScoreNet's cross-entropy, summed over horizontal layers; None without them.
        scorenet_logits: one (B, C) for each horizontal layer.
        horizontal: the record of each horizontal layer, see :class:`~hf_tokenmixup.horizontal.HorizontalMixRecord`.
        counts: scalars on the device for logs: ``scorenet_loss``, and the mean over horizontal layers of
            ``easy_samples``, ``mixed_samples``, ``replaced_tokens`` in the batch and of ``difficulty`` (nats);
            ``vertical_tokens``, how many tokens of the batch were collected for vertical layers.
    """

    targets: torch.Tensor | None = None
    scorenet_loss: torch.Tensor | None = None
    scorenet_logits: tuple[torch.Tensor, ...] | None = None
    horizontal: tuple[HorizontalMixRecord, ...] | None = None
    counts: dict[str, torch.Tensor] | None = None


class ManifoldMixupParams(NamedTuple):
    """What was drawn for manifold mixup in one forward, as tensors: one compiled graph serves every draw.

    Attributes:
        position: () int64, which of the configured layers mixes.
        share: () what is kept of each image.
        partner: (B,) int64, a permutation.
    """

    position: torch.Tensor
    share: torch.Tensor
    partner: torch.Tensor

    @classmethod
    def of(cls, num_layers: int, alpha: float, batch: int, device: torch.device) -> "ManifoldMixupParams":
        """One of so many layers, the share from Beta(alpha, alpha) and any permutation."""
        # The first two come from the host's generator, and are not checked: either way the device would be waited for.
        position = torch.randint(num_layers, ())
        share = torch.distributions.Beta(float(alpha), float(alpha), validate_args=False).sample()
        partner = torch.randperm(batch, device=device)
        return cls(position.to(device, non_blocking=True), share.to(device, non_blocking=True), partner)


class TokenMixupContext:
    """What travels with the hidden states of one training forward, from layer to layer; it dies with the forward.

    No dataclass: FSDP looks into these for tensors, and would hand every layer a copy.

    Args:
        layers: the network's layers, which a rollout looks ahead in.
        memory: tokens collected for vertical layers.
        targets: (B, C) as the last mixing left them.

    Attributes:
        saliency: (B, T) of the tokens where the detector looks at the input; it goes where a token goes. None for
            detectors that look at the tokens themselves.
        manifold: what manifold mixup does in this forward, if it is on.
        scorenet_losses: (B,) for each horizontal layer passed, against the targets that entered it.
        steps: the record of each horizontal layer passed.
    """

    def __init__(self, layers: Sequence[nn.Module], memory: VerticalMemory, targets: torch.Tensor):
        self.layers = layers
        self.memory = memory
        self.targets = targets
        self.saliency: torch.Tensor | None = None
        self.manifold: ManifoldMixupParams | None = None
        self.scorenet_losses: list[torch.Tensor] = []
        self.steps: list[HorizontalMixRecord] = []

    def counts(self) -> dict[str, torch.Tensor]:
        """Scalars for logs, see :class:`TokenMixupOutput`; they stay on the device."""
        counts = {}
        if self.steps:
            replaced = torch.stack([step.replaced for step in self.steps])  # (layers, B, T)
            layers = len(self.steps)
            counts["scorenet_loss"] = torch.stack(self.scorenet_losses).detach().mean(dim=1).sum()
            counts["easy_samples"] = torch.stack([step.easy for step in self.steps]).sum() / layers
            counts["mixed_samples"] = replaced.any(dim=2).sum() / layers
            counts["replaced_tokens"] = replaced.sum() / layers
            counts["difficulty"] = torch.stack([step.difficulty for step in self.steps]).mean()
        if self.memory.num_tokens:
            counts["vertical_tokens"] = self.targets.new_full((), len(self.targets) * self.memory.num_tokens)
        return counts
