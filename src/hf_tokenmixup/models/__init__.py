"""Model families with TokenMixup."""

from .auto import FAMILIES, load_classifier
from .mixing import TokenMixupModel, TokenMixupOutput
from .vit import TokenMixupViTConfig, TokenMixupViTForImageClassification, TokenMixupViTLayer

__all__ = [
    "FAMILIES",
    "TokenMixupModel",
    "TokenMixupOutput",
    "TokenMixupViTConfig",
    "TokenMixupViTForImageClassification",
    "TokenMixupViTLayer",
    "load_classifier",
]
