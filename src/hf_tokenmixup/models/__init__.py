"""Model families with TokenMixup."""

from .auto import FAMILIES, load_classifier, stored_config
from .cct import (
    CctConfig,
    CctForImageClassification,
    CctModel,
    TokenMixupCctConfig,
    TokenMixupCctForImageClassification,
    TokenMixupCctLayer,
)
from .mixing import TokenMixupModel
from .state import TokenMixupOutput
from .vit import TokenMixupViTConfig, TokenMixupViTForImageClassification, TokenMixupViTLayer

__all__ = [
    "FAMILIES",
    "CctConfig",
    "CctForImageClassification",
    "CctModel",
    "TokenMixupCctConfig",
    "TokenMixupCctForImageClassification",
    "TokenMixupCctLayer",
    "TokenMixupModel",
    "TokenMixupOutput",
    "TokenMixupViTConfig",
    "TokenMixupViTForImageClassification",
    "TokenMixupViTLayer",
    "load_classifier",
    "stored_config",
]
