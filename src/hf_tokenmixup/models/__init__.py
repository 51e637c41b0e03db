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
from .heads import class_names
from .modeling_tokenmixup import TokenMixupModel
from .outputs import AVERAGED_COUNTS, TokenMixupOutput
from .peft_utils import adapter_layers, without_adapters
from .positions import border_hint, height_and_width
from .task import check_evaluated_task, require_single_label
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
    "border_hint",
    "check_evaluated_task",
    "class_names",
    "height_and_width",
    "load_classifier",
    "require_single_label",
    "stored_config",
    "without_adapters",
]
