"""Model families with TokenMixup."""

from .auto import FAMILIES, load_classifier
from .mixing import TokenMixupModel
from .state import TokenMixupOutput
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
