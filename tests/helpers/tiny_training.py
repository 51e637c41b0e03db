"""Small images and models for tests of training."""

import torch
from helpers.families import build_tiny
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from hf_tokenmixup.models import (
    TokenMixupCctConfig,
    TokenMixupCctForImageClassification,
    TokenMixupModelMixin,
    TokenMixupViTConfig,
    TokenMixupViTForImageClassification,
)

CLASSES = 4
VIT = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": CLASSES,
}


class Images(torch.utils.data.Dataset):
    """Noise of shape `(3, 8, 8)` whose brightness is the label. `seen` lists the epoch of each item that was read."""

    def __init__(self, size: int):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(CLASSES, (size,), generator=generator)
        self.pixels = torch.randn(size, 3, 8, 8, generator=generator) + self.labels.view(-1, 1, 1, 1)
        self.epoch = None
        self.seen = []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        self.seen.append(self.epoch)
        # As with an augmentation, the pixels depend on the epoch.
        return {"pixel_values": self.pixels[index] + 0.1 * (self.epoch or 0), "labels": int(self.labels[index])}


def plain_vit(**settings) -> ViTForImageClassification:
    """Create a ViT of transformers, with the same random weights each time."""
    torch.manual_seed(1)
    return ViTForImageClassification(ViTConfig(**VIT | settings))


def tokenmixup_vit(**settings) -> TokenMixupViTForImageClassification:
    """Create a TokenMixup ViT that mixes in every batch, with the same random weights each time."""
    torch.manual_seed(1)
    settings = {
        "horizontal_layers": [1],
        "horizontal_tau": None,
        "vertical_layers": [2],
        "vertical_kappa": 2,
    } | settings
    return TokenMixupViTForImageClassification(TokenMixupViTConfig(**VIT | {"horizontal_rho": 0.0} | settings))


def tokenmixup_cct(**settings) -> TokenMixupCctForImageClassification:
    """Create a TokenMixup CCT, with the same random weights each time."""
    torch.manual_seed(1)
    config = {name: VIT[name] for name in VIT if name != "patch_size"}
    settings = {"horizontal_layers": [1], "vertical_layers": [2], "vertical_kappa": 2, "pooling_stride": 1} | settings
    return TokenMixupCctForImageClassification(TokenMixupCctConfig(**config, horizontal_rho=0.0, **settings))


def tokenmixup_family(model_type: str, **settings) -> TokenMixupModelMixin:
    """Create a TokenMixup model of any family, with the same random weights each time."""
    settings = {"horizontal_layers": [1], "vertical_layers": [2], "vertical_kappa": 2} | settings
    return build_tiny(
        model_type, **VIT | {"horizontal_rho": 0.0, "hidden_size": 24, "num_attention_heads": 3} | settings
    )


def resnet() -> ResNetForImageClassification:
    """Create a ResNet, with the same random weights each time."""
    torch.manual_seed(1)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=CLASSES)
    return ResNetForImageClassification(config)
