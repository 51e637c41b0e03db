"""What a model is, read off its configuration: name, size, and the settings of TokenMixup that are in force."""

import dataclasses
import json
from dataclasses import dataclass

import torch
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from ..configuration import TokenMixupConfigMixin
from ..models import FAMILIES, height_and_width

MAX_CLASS_NAMES = 20
_VIT_SIZES = {(192, 12): "Ti", (384, 12): "S", (768, 12): "B", (1024, 24): "L", (1280, 32): "H"}
_HORIZONTAL = ("horizontal_", "scorenet_", "rollout_steps", "assignment", "token_selection", "relabel")


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """A classifier in words and numbers; what its configuration does not tell is None or empty.

    `settings` are (name, value, meaning) of those in force. `requires_remote_code`: transformers has no such model, so
    it opens with the code that lies beside the weights.
    """

    name: str
    family: str
    num_parameters: int
    num_labels: int
    class_names: list[str]
    image_size: tuple[int, int] | None
    sizes: list[tuple[str, str]]
    horizontal_layers: list[int]
    vertical_layers: list[int]
    manifold_layers: list[int]
    settings: list[tuple[str, str, str]]
    requires_remote_code: bool

    @property
    def uses_tokenmixup(self) -> bool:
        """Whether HTM or VTM is on; manifold mixup is neither."""
        return bool(self.horizontal_layers or self.vertical_layers)


def describe(config: PreTrainedConfig) -> ModelSummary:
    """Describe an image classifier; parameters are counted without the memory for them.

    Args:
        config: of any classifier that transformers knows or that this package adds, with or without our settings.

    Raises:
        ValueError: for a configuration of no image classifier, or with settings of TokenMixup that do not fit it.
    """
    family = FAMILIES.get(config.model_type)
    settings = family[0].from_dict(config.to_dict()) if family else None
    mixing = settings is not None and settings.tokenmixup_enabled
    # The names that transformers makes up where none were given tell nothing.
    names = [name for _, name in sorted(config.id2label.items())]
    told = len(names) <= MAX_CLASS_NAMES and not all(name.startswith("LABEL_") for name in names)
    image_size = getattr(config, "image_size", None)
    return ModelSummary(
        name=_name(config),
        family=config.model_type,
        num_parameters=_num_parameters(config),
        num_labels=config.num_labels,
        class_names=names if told else [],
        image_size=None if image_size is None else height_and_width(image_size),
        sizes=_sizes(config, settings),
        horizontal_layers=sorted(settings.horizontal_layers) if mixing else [],
        vertical_layers=sorted(settings.vertical_layers) if mixing else [],
        manifold_layers=sorted(settings.manifold_mixup_layers) if mixing else [],
        settings=_active_settings(settings) if mixing else [],
        requires_remote_code=family is not None
        and not family[1].base_model_class.__module__.startswith("transformers."),
    )


def _name(config: PreTrainedConfig) -> str:
    if config.model_type == "vit":
        size = _VIT_SIZES.get((config.hidden_size, config.num_hidden_layers))
        return f"ViT-{size}/{config.patch_size}" if size else "Vision Transformer (ViT)"
    if config.model_type == "cct":
        layers = config.num_hidden_layers
        return {
            ("convolution", "sequence"): f"CCT-{layers}/{config.conv_kernel_size}x{config.num_conv_layers}",
            ("patch", "sequence"): f"CVT-{layers}/{config.patch_size}",
            ("patch", "cls"): f"ViT-Lite-{layers}/{config.patch_size}",
        }.get((config.tokenizer, config.pooling), "Compact Transformer (CCT)")
    return f"`{config.model_type}`"


def _sizes(config: PreTrainedConfig, settings: TokenMixupConfigMixin | None) -> list[tuple[str, str]]:
    if settings is None:
        return []
    tokens = f"{settings.num_patch_tokens}" + (" and a CLS token" if settings.num_prefix_tokens else "")
    return [
        ("layers", str(config.num_hidden_layers)),
        ("width", str(config.hidden_size)),
        ("heads", str(config.num_attention_heads)),
        ("width of the MLP", str(config.intermediate_size)),
        ("tokens", tokens),
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
    off = () if settings.horizontal_layers else _HORIZONTAL
    off += () if settings.vertical_layers else ("vertical_",)
    off += () if settings.horizontal_layers or settings.vertical_layers else ("saliency_",)
    off += () if settings.saliency_detector == "attention" else ("saliency_query", "saliency_route", "rollout_steps")
    off += () if settings.manifold_mixup_layers else ("manifold_",)
    off += () if settings.assignment_group_size else ("assignment_group_size",)
    rows = []
    for item in dataclasses.fields(TokenMixupConfigMixin):
        if not item.name.startswith(off):
            value = getattr(settings, item.name)
            rows.append((item.name, "none" if value is None else _plain(value), item.metadata["help"]))
    return rows


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
