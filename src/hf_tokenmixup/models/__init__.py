"""Model families with TokenMixup."""

from .mixing import TokenMixupModel, TokenMixupOutput
from .vit import TokenMixupViTConfig, TokenMixupViTForImageClassification, TokenMixupViTLayer

__all__ = [
    "TokenMixupModel",
    "TokenMixupOutput",
    "TokenMixupViTConfig",
    "TokenMixupViTForImageClassification",
    "TokenMixupViTLayer",
]
