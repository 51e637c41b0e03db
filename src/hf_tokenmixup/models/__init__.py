"""Model families with TokenMixup."""

from .adapters import adapter_layers, without_adapters
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
from .state import AVERAGED_COUNTS, TokenMixupOutput
from .vit import TokenMixupViTConfig, TokenMixupViTForImageClassification, TokenMixupViTLayer

__all__ = [
    "AVERAGED_COUNTS",
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
    "adapter_layers",
    "load_classifier",
    "stored_config",
    "without_adapters",
]
