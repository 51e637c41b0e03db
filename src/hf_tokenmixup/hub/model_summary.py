"""Summary of a model from its configuration: name, size and active TokenMixup settings."""

import dataclasses
import json
from dataclasses import dataclass

import torch
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from ..configuration import AUTO, RELATIVE_THRESHOLDS, TokenMixupConfigMixin
from ..models import FAMILIES, describe_unsupported, get_image_size

MAX_CLASS_NAMES = 20
_HORIZONTAL_PREFIXES = ("horizontal_", "scorenet_", "rollout_steps", "assignment", "token_selection", "relabel")


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """Facts about an image classifier. Those that are unknown are None or empty.

    Attributes:
        name: Name of the architecture and size, such as `ViT-B/16`.
        family: Model type of the configuration.
        num_parameters: Number of parameters of the plain model.
        num_labels: Number of classes.
        class_names: Names of the classes, if there are up to `MAX_CLASS_NAMES`.
        image_size: Height and width in pixels.
        supports_tokenmixup: The model type supports TokenMixup, and there is more than one layer.
        sizes: Names and values for the model's table.
        horizontal_layers: Indices of the layers with HTM.
        vertical_layers: Indices of the layers with VTM.
        manifold_layers: Indices of the layers with manifold mixup.
        settings: Name, value and description of each active setting.
        requires_remote_code: transformers does not implement the model, so it is loaded with the code that is stored
            next to the weights.
    """

    name: str
    family: str
    num_parameters: int
    num_labels: int
    class_names: list[str]
    image_size: tuple[int, int] | None
    supports_tokenmixup: bool
    sizes: list[tuple[str, str]]
    horizontal_layers: list[int]
    vertical_layers: list[int]
    manifold_layers: list[int]
    settings: list[tuple[str, str, str]]
    requires_remote_code: bool

    @property
    def uses_tokenmixup(self) -> bool:
        """Whether HTM or VTM is enabled. Manifold mixup does not count."""
        return bool(self.horizontal_layers or self.vertical_layers)


def summarize_model(config: PreTrainedConfig) -> ModelSummary:
    """Summarize an image classifier. Parameters are counted on the meta device.

    Args:
        config: Configuration of any image classifier of transformers or of this package.

    Raises:
        ValueError: The configuration is not that of an image classifier, or has invalid TokenMixup settings.
    """
    family = FAMILIES[config.model_type] if describe_unsupported(config.to_dict()) is None else None
    settings = family[0].from_dict(config.to_dict()) if family else None
    enabled = settings is not None and settings.tokenmixup_enabled
    # transformers names classes LABEL_0, LABEL_1, ... if it gets no names.
    names = [name for _, name in sorted(config.id2label.items())]
    show_names = len(names) <= MAX_CLASS_NAMES and not all(name.startswith("LABEL_") for name in names)
    return ModelSummary(
        name=settings.architecture_name if settings else f"`{config.model_type}`",
        family=config.model_type,
        num_parameters=_num_parameters(config),
        num_labels=config.num_labels,
        class_names=names if show_names else [],
        image_size=get_image_size(config),
        supports_tokenmixup=settings is not None and settings.network.num_layers > 1,
        sizes=_sizes(settings),
        horizontal_layers=sorted(settings.horizontal_layers) if enabled else [],
        vertical_layers=sorted(settings.vertical_layers) if enabled else [],
        manifold_layers=sorted(settings.manifold_mixup_layers) if enabled else [],
        settings=_active_settings(settings) if enabled else [],
        requires_remote_code=family is not None
        and not family[1].base_model_class.__module__.startswith("transformers."),
    )


def _sizes(settings: TokenMixupConfigMixin | None) -> list[tuple[str, str]]:
    if settings is None:
        return []
    network = settings.network
    prefix = {0: "", 1: " and a CLS token"}.get(
        network.num_prefix_tokens, f", a CLS token and {network.num_prefix_tokens - 1} other prefix tokens"
    )
    return [
        ("layers", str(network.num_layers)),
        ("hidden size", str(network.hidden_size)),
        ("heads", str(network.num_heads)),
        ("MLP size", str(network.mlp_size)),
        ("tokens", f"{settings.num_patch_tokens}{prefix}"),
    ]


def _num_parameters(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        return _plain_model(config).num_parameters()


def _plain_model(config: PreTrainedConfig) -> PreTrainedModel:
    if config.model_type in FAMILIES:
        model_class = FAMILIES[config.model_type][1].base_model_class
        return model_class(model_class.config_class.from_dict(config.to_dict()))
    return AutoModelForImageClassification.from_config(config)


def _active_settings(settings: TokenMixupConfigMixin) -> list[tuple[str, str, str]]:
    """List name, value and description of the settings that have an effect."""
    is_active_by_prefix = {
        _HORIZONTAL_PREFIXES: settings.horizontal_layers,
        ("vertical_",): settings.vertical_layers,
        ("saliency_",): settings.horizontal_layers or settings.vertical_layers,
        ("saliency_query", "saliency_route", "rollout_steps"): settings.saliency_detector == "attention",
        ("manifold_",): settings.manifold_mixup_layers,
        ("assignment_group_size",): settings.assignment_group_size,
    }
    inactive = tuple(
        prefix for prefixes, is_active in is_active_by_prefix.items() if not is_active for prefix in prefixes
    )
    # A threshold is listed in the form that is set.
    unset = {
        absolute if getattr(settings, relative) is not None else relative
        for absolute, relative in RELATIVE_THRESHOLDS.items()
    }
    rows = []
    for item in dataclasses.fields(TokenMixupConfigMixin):
        value = getattr(settings, item.name)
        if not item.name.startswith(inactive) and item.name not in unset:
            text = "none" if value is None else _format_value(value)
            if value == AUTO and hasattr(settings, f"effective_{item.name}"):
                text += f" ({getattr(settings, f'effective_{item.name}')})"
            rows.append((item.name, text, item.metadata["help"]))
    return rows


def _format_value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
