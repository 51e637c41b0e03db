"""Small images and models for the tests of training."""

import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from hf_tokenmixup.models import (
    TokenMixupCctConfig,
    TokenMixupCctForImageClassification,
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
    """Noise with the label in its brightness. `seen` lists the epoch that each item was read in."""

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
        # As an augmentation does, what is read depends on the epoch.
        return {"pixel_values": self.pixels[index] + 0.1 * (self.epoch or 0), "labels": int(self.labels[index])}


def plain_vit(**settings) -> ViTForImageClassification:
    torch.manual_seed(1)
    return ViTForImageClassification(ViTConfig(**VIT | settings))


def tokenmixup_vit(**settings) -> TokenMixupViTForImageClassification:
    torch.manual_seed(1)
    settings = {
        "horizontal_layers": [1],
        "horizontal_tau": None,
        "vertical_layers": [2],
        "vertical_kappa": 2,
    } | settings
    return TokenMixupViTForImageClassification(TokenMixupViTConfig(**VIT | {"horizontal_rho": 0.0} | settings))


def tokenmixup_cct(**settings) -> TokenMixupCctForImageClassification:
    torch.manual_seed(1)
    size = {name: VIT[name] for name in VIT if name != "patch_size"}
    settings = {"horizontal_layers": [1], "vertical_layers": [2], "vertical_kappa": 2, "pooling_stride": 1} | settings
    return TokenMixupCctForImageClassification(TokenMixupCctConfig(**size, horizontal_rho=0.0, **settings))


def resnet() -> ResNetForImageClassification:
    torch.manual_seed(1)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=CLASSES)
    return ResNetForImageClassification(config)
