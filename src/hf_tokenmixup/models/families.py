"""Model families that support TokenMixup, collected from the modules of this package.

A family is a module or subpackage with `MODEL_TYPES`, a dictionary from model types to the configuration class and the
model class. Nothing else names the families. A model type other than that of the configuration class is an alias: its
checkpoints load as models of that type.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration import TokenMixupConfigMixin

# These modules import this one, so they cannot be imported here.
_SKIPPED = ("auto", "families", "in_place")
_WINDOWS = "attention is limited to windows and tokens are merged between stages, so no layer compares all tokens"
_POOLED = "tokens are pooled between stages, so a query or key is no token of the image"
_VARIABLE_GRID = "images of a batch have different grids, so the same position is another place in each image"
# Reasons for which a model type, or an architecture of timm with this beginning, does not support TokenMixup.
UNSUPPORTED = {
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "hiera": _POOLED,
    "pvt": _POOLED,
    "pvt_v2": _POOLED,
    "cait": "its attention mixes the heads, and the CLS token enters in the last layers only",
    "xcit": "its attention is between channels, not between tokens",
    "siglip2": _VARIABLE_GRID,
    "dinov3_vit": "transformers has no image classifier for it, but timm has (for example "
    "timm/vit_small_patch16_dinov3.lvd1689m)",
    "naflex": _VARIABLE_GRID,
}


def collect_families() -> dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]]:
    """Return the configuration class and the model class of each model type that supports TokenMixup."""
    package = importlib.import_module(__package__)
    families: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        if info.name not in _SKIPPED:
            module = importlib.import_module(f"{__package__}.{info.name}")
            families |= getattr(module, "MODEL_TYPES", {})
    return dict(sorted(families.items()))


FAMILIES = collect_families()


def get_family_config(config: PreTrainedConfig) -> TokenMixupConfigMixin | None:
    """Convert the configuration of a plain model to that of its family, without the settings of TokenMixup.

    Args:
        config: configuration of any image classifier.

    Returns:
        The configuration, for example for its `network`; None if the model does not support TokenMixup.
    """
    if describe_unsupported(config.to_dict()) is not None:
        return None
    settings = TokenMixupConfigMixin.__dataclass_fields__
    attributes = {name: value for name, value in config.to_dict().items() if name not in settings}
    return FAMILIES[config.model_type][0].from_dict(attributes)


def describe_unsupported(config_dict: Mapping[str, Any]) -> str | None:
    """Describe which model types support TokenMixup, and why another type does not if the reason is known.

    Args:
        config_dict: content of a config.json, with `model_type` and for models of timm `architecture`.

    Returns:
        A sentence for an error message, without the full stop. None if the model supports TokenMixup.
    """
    model_type, architecture = config_dict.get("model_type"), config_dict.get("architecture")
    of_family = None
    if model_type in FAMILIES:
        of_family = FAMILIES[model_type][0].describe_unsupported(config_dict)
        if of_family is None:
            return None
    name = architecture if isinstance(architecture, str) else model_type
    matching = [known for known in UNSUPPORTED if model_type == known or str(architecture).startswith(known)]
    if of_family and not matching:
        return of_family
    reason = f": {UNSUPPORTED[max(matching, key=len)]}" if matching else ""
    return f"TokenMixup supports the model types {', '.join(FAMILIES)}, got {name!r}{reason}"
