"""Image classifiers with TokenMixup."""

from .auto import load_classifier, load_config_dict
from .cct import (
    CctConfig,
    CctForImageClassification,
    CctModel,
    TokenMixupCctConfig,
    TokenMixupCctForImageClassification,
    TokenMixupCctLayer,
)
from .cct.configuration_cct import height_and_width
from .families import FAMILIES, describe_unsupported, get_family_config
from .heads import class_names
from .in_place import add_tokenmixup, remove_tokenmixup
from .modeling_tokenmixup import TokenMixupModelMixin
from .outputs import AVERAGED_METRICS, TokenMixupOutput, summarize_mixing_metrics
from .peft_utils import find_adapter_layers, merge_adapters
from .positions import border_hint, get_image_size
from .task import validate_evaluated_task, validate_single_label
from .vit import TokenMixupViTConfig, TokenMixupViTForImageClassification, TokenMixupViTLayer

__all__ = [
    "AVERAGED_METRICS",
    "FAMILIES",
    "CctConfig",
    "CctForImageClassification",
    "CctModel",
    "TokenMixupCctConfig",
    "TokenMixupCctForImageClassification",
    "TokenMixupCctLayer",
    "TokenMixupModelMixin",
    "TokenMixupOutput",
    "TokenMixupViTConfig",
    "TokenMixupViTForImageClassification",
    "TokenMixupViTLayer",
    "add_tokenmixup",
    "find_adapter_layers",
    "border_hint",
    "validate_evaluated_task",
    "class_names",
    "describe_unsupported",
    "get_family_config",
    "get_image_size",
    "height_and_width",
    "load_classifier",
    "validate_single_label",
    "load_config_dict",
    "merge_adapters",
    "remove_tokenmixup",
    "summarize_mixing_metrics",
]
